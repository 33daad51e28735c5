"""Rank by chance: what any other rule has to beat.

The number that stands for a place is a hash of the seed, the decision layer and the place, so a prompt is answered the
same way each time, alone or in a batch. Seeds differ in which places they keep, not from prompt to prompt.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..passes import Candidates
from .rule_checks import FORBID

_PRIME = 2**31 - 1
_MULTIPLIER = 48271  # of the minimal standard generator (Park, Miller and Stockmeyer, 1993)
_ROUNDS = 4


@dataclass(frozen=True)
class ChanceRule:
    """A number below 2^24 for each place, exact in float32; the seed is that of the configuration."""

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID
    layer: ClassVar[None] = None

    by: Literal["chance"] = "chance"

    def __str__(self) -> str:
        return "chance"

    def __call__(self, candidates: Candidates) -> torch.Tensor:
        first = (candidates.seed * 1_000_003 + candidates.layer * 7919 + 12345) % _PRIME
        # Places without a token are beyond all sizes.
        state = (candidates.visual_index.clamp(max=2**24) + first) % _PRIME
        for step in range(_ROUNDS):
            # The product of its halves mixes what a multiplication alone would leave in order.
            state = (state * _MULTIPLIER + (state % 65536) * (state // 65536) + step) % _PRIME
        return (state % 2**24).float()
