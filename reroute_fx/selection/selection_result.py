"""What was selected for a prompt."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from ..config.routing_config import RoutingConfig
from .row_plan import RowPlan


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
            `all_scores` and `all_kept` count in those.
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

        They count in all the row's visual tokens, whatever was deleted before or never entered the decoder.
        """
        return {
            layer: tuple(self._in_prompt(row, kept[row].nonzero().flatten()) for row in self._rows)
            for layer, kept in self.all_kept.items()
        }

    @cached_property
    def pool(self) -> dict[int, tuple[torch.Tensor, ...]]:
        """For each decision layer the tokens of each row that were ranked, ``[pool]`` int64, ascending.

        All that entered the decoder; for `physical_delete` those that were left. They count as in `selected`.
        """
        return {
            layer: tuple(map(self._in_prompt, self._rows, candidates))
            for layer, candidates in self._candidates.items()
        }

    @cached_property
    def scores(self) -> dict[int, tuple[torch.Tensor, ...]]:
        """For each decision layer what the tokens in the row's `pool` were ranked by, ``[pool]`` float32."""
        return {
            layer: tuple(self.all_scores[layer][row, which] for row, which in enumerate(candidates))
            for layer, candidates in self._candidates.items()
        }

    @property
    def kv_lengths(self) -> tuple[tuple[int, ...], ...]:
        """For each row the tokens in the key-value cache of each layer after the prompt."""
        return tuple(zip(*self.plan.layer_lengths(self.num_layers), strict=True))

    @property
    def _rows(self) -> range:
        return range(len(self.plan.images))

    @cached_property
    def _candidates(self) -> dict[int, list[torch.Tensor]]:
        """For each decision layer the tokens of each row that it ranked, of those that entered."""
        found, before = {}, None
        for layer, kept in self.all_kept.items():
            if before is None or self.config.action != "physical_delete":
                found[layer] = [torch.arange(sum(row), device=kept.device) for row in self.plan.images]
            else:
                found[layer] = [row.nonzero().flatten() for row in before]
            before = kept
        return found

    def _in_prompt(self, row: int, entered: torch.Tensor) -> torch.Tensor:
        """Tokens of a row that count in those that entered the decoder, among all of its visual tokens."""
        return entered if self.all_entered is None else self.entered[row][entered]
