"""What a ranking rule is given, and the rule that attention itself is."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Candidates:
    """The visual tokens that a decision chooses from.

    Attributes:
        hidden: residual stream at the input of the scoring layer, ``[B, S, d]``.
        query: that layer's rotated query of each row's last token, ``[B, H, 1, D]``.
        keys: its rotated keys of the whole stream, ``[B, Hkv, S, D]``.
        scale: its factor on their products.
        visual_index: places of the visual tokens in the stream, ``[B, N]`` int64. An entry at or above the length of
            its row stands for no token.
        lengths: tokens of each row, ``[B]`` int64.
        layer: decision layer.
        seed: for rules that choose by chance.
    """

    hidden: torch.Tensor
    query: torch.Tensor
    keys: torch.Tensor
    scale: float
    visual_index: torch.Tensor
    lengths: torch.Tensor
    layer: int
    seed: int


Rank = Callable[[Candidates], torch.Tensor]
"""Scores ``[B, N]`` of the candidates, the higher the better. What it returns for places without a token is not used.

It is traced, once, with sizes that stay symbolic: plain tensor operations, and no choices that depend on data.
"""


def by_attention(candidates: Candidates) -> torch.Tensor:
    """How much each row's last token attends to each visual token, mean over heads."""
    scores: torch.Tensor = torch.ops.reroute.visual_scores(
        candidates.query, candidates.keys, candidates.visual_index, candidates.lengths, candidates.scale
    )
    return scores
