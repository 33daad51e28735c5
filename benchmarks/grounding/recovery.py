"""What became of the visual tokens on the thing that a question means."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reroute_fx.grounding.scenes import Box


@dataclass(frozen=True)
class Stage:
    """Counts of visual tokens at one decision.

    Attributes:
        tokens: there are.
        target: that lie on the thing which is asked for.
        kept, kept_target: kept by this decision, and of these on the target.
        out, out_target: not kept by the decision before, and of these on the target.
        back, back_target: kept by this decision but not by the one before, and of these on the target.
    """

    tokens: int
    target: int
    kept: int
    kept_target: int
    out: int
    out_target: int
    back: int
    back_target: int


def recovery(kept: Sequence[Tensor], box: Box) -> list[Stage]:
    """Counts for each decision, from which visual tokens `[N]`, a square by rows, were kept."""
    if not kept:
        return []
    tokens = len(kept[0])
    on_target = tokens_on(box, round(tokens**0.5))
    stages, before = [], torch.ones(tokens, dtype=torch.bool)
    for now in kept:
        back, out = now & ~before, ~before
        counts = [tokens, on_target.sum()]
        counts += [
            count for chosen in (now, out, back) for count in (chosen.sum(), (chosen & on_target).sum())
        ]
        stages.append(Stage(*map(int, counts)))
        before = now
    return stages


def tokens_on(box: Box, side: int) -> Tensor:
    """Which of side x side tokens, by rows, have their middle in a box `[N]` bool."""
    middles = (torch.arange(side) + 0.5) / side
    x1, y1, x2, y2 = box
    across = (middles >= x1) & (middles < x2)
    down = (middles >= y1) & (middles < y2)
    return (down[:, None] & across).flatten()
