"""What was selected for a prompt."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from ..config import RoutingConfig
from ..plan import RowPlan


@dataclass(frozen=True)
class Routing:
    """What was selected for the rows of a prompt.

    Attributes:
        config: the configuration that selected.
        plan: how many tokens of each row ran where.
        num_layers: layers of the decoder.
        all_scores: for each decision layer ``[B, N]`` float32, -inf for tokens that were no candidates.
        all_kept: for each decision layer which visual tokens were kept, ``[B, N]`` bool.
        all_entered: which visual tokens of the prompt entered the decoder, ``[B, prompt's]`` bool; None if all did.
            What decisions chose from counts in those.
    """

    config: RoutingConfig
    plan: RowPlan
    num_layers: int
    all_scores: Mapping[int, torch.Tensor]
    all_kept: Mapping[int, torch.Tensor]
    all_entered: torch.Tensor | None = None

    @cached_property
    def entered(self) -> tuple[torch.Tensor, ...]:
        """The visual tokens of each row that entered the decoder, ``[n]`` int64, ascending, of all in the prompt."""
        if self.all_entered is None:
            return tuple(torch.arange(sum(row)) for row in self.plan.images)
        return tuple(row.nonzero().flatten() for row in self.all_entered)

    @cached_property
    def selected(self) -> dict[int, tuple[torch.Tensor, ...]]:
        """For each decision layer the kept tokens of each row, ``[k]`` int64, ascending.

        They count in the row's visual tokens, for `physical_delete` in those that were left.
        """
        return self._for_each_candidate(self.all_kept, lambda kept: kept.nonzero().flatten())

    @cached_property
    def scores(self) -> dict[int, tuple[torch.Tensor, ...]]:
        """For each decision layer the scores of the tokens in each row's pool, ``[pool]`` float32."""
        return self._for_each_candidate(self.all_scores, torch.clone)

    @property
    def kv_lengths(self) -> tuple[tuple[int, ...], ...]:
        """For each row the tokens in the key-value cache of each layer after the prompt."""
        return tuple(zip(*self.plan.layer_lengths(self.num_layers), strict=True))

    def _for_each_candidate(
        self, values: Mapping[int, torch.Tensor], read: Callable[[torch.Tensor], torch.Tensor]
    ) -> dict[int, tuple[torch.Tensor, ...]]:
        counts = [sum(row) for row in self.plan.images]
        candidates = [torch.arange(count) for count in counts]
        found = {}
        for layer, rows in values.items():
            of_candidates = [row[which.to(row.device)] for row, which in zip(rows, candidates, strict=True)]
            found[layer] = tuple(map(read, of_candidates))
            if self.config.action == "physical_delete":
                candidates = [kept.nonzero().flatten() for kept in self.all_kept[layer]]
        return found
