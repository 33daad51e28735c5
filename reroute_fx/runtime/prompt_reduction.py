"""Prompts of which pictures enter the decoder with fewer tokens than they have placeholders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..config.routing_config import RoutingConfig
from ..passes import GONE
from .rows import Places


@dataclass(frozen=True)
class EnteredRows:
    """The rows of a prompt, less what is gone.

    Attributes:
        places: where the tokens that are left lie in the columns of the batch.
        embeds: tokens first, ``[B, S', d]``.
        entered: which visual tokens of each row are left, ``[B, N]`` bool.
    """

    places: Places
    embeds: torch.Tensor
    entered: torch.Tensor


@dataclass
class ReducedFeatures(BaseModelOutputWithPooling):
    """What `get_image_features` returns where a method reduces pictures: rows of -inf for features that are gone."""


@dataclass(frozen=True)
class PromptReduction:
    """What is known of a prompt before its pictures are encoded: how many tokens are left, not which.

    Attributes:
        is_token: which columns hold a token, ``[B, S]`` bool.
        visual_columns: of the visual tokens of each row, ``[B, N]`` int64; S where a row has no more.
        width: tokens that are left in the longest row.
        cells: inputs of the program that say where each visual token of the pictures lies, ``[B, N]``, by name.
    """

    is_token: torch.Tensor
    visual_columns: torch.Tensor
    width: int
    cells: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def enter(self, embeds: torch.Tensor) -> EnteredRows:
        """Drop the rows that a reduction marked, of embeddings ``[B, S, d]`` in the columns of the batch."""
        is_gone = (embeds[..., 0] == GONE) & self.is_token
        places = Places.of(self.is_token & ~is_gone)
        kept = places.to_front(embeds.masked_fill(is_gone[..., None], 0))[:, : self.width]
        columns = self.visual_columns.clamp(max=embeds.shape[1] - 1)
        entered = ~is_gone.gather(1, columns) & (self.visual_columns < embeds.shape[1])
        return EnteredRows(places, kept, entered)

    def cells_of(self, entered: torch.Tensor, tokens: int) -> dict[str, torch.Tensor]:
        """`cells` of the visual tokens that are left, ``[B, tokens]``; `entered` says which, ``[B, N]`` bool."""
        if not self.cells:
            return {}
        # A prompt without pictures has a place for one token.
        gone = F.pad(~entered, (0, max(0, tokens - entered.shape[1])), value=True)
        order = gone.to(torch.int8).sort(dim=1, stable=True).indices[:, :tokens]
        return {name: values.gather(1, order) for name, values in self.cells.items()}

    def positions(self, given: torch.Tensor | None, places: Places) -> torch.Tensor:
        """Rotary positions of the tokens that are left; `given` are those of the batch's columns."""
        if given is None:
            given = (self.is_token.cumsum(dim=1) - 1).clamp(min=0)
        batch, length = self.is_token.shape
        given = given.expand(*given.shape[:-2], batch, length)
        return places.to_front(given, given.ndim - 1)[..., : self.width].contiguous()


def plan_entry(
    config: RoutingConfig, is_visual: torch.Tensor, lengths: Sequence[int], images: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, list[int], list[list[int]]]:
    """What `plan_rows` takes, for the tokens that are left; all of it on the host.

    Which visual tokens are left makes no difference: the first ones of each image stand for them.
    """
    entering = [[config.entering(tokens) for tokens in row] for row in images]
    rows = []
    for row, length, before, after in zip(is_visual, lengths, images, entering, strict=True):
        stays = ~row[:length]
        stays[row[:length]] = torch.tensor(
            [i < left for tokens, left in zip(before, after, strict=True) for i in range(tokens)],
            dtype=torch.bool,
        )
        rows.append(row[:length][stays])
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return padded, [len(row) for row in rows], entering
