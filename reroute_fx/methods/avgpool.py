"""Average pooling: pictures enter with fewer, coarser features, and nothing is decided behind that.

The control of every method that chooses: the same budget without choosing. At few tokens it beats most published
methods on grounding (Nüwa, arXiv 2602.02951). A picture is cut into rows of equal height and each row into
cells of equal width, as many as there is budget for; a feature is the mean over the area of its cell and stands at its
middle.
"""

import math

import torch

from ..passes import TowerStates
from .method import Method, Reduction, Schedule


def reduce(tower: TowerStates) -> tuple[torch.Tensor, torch.Tensor]:
    """The middles of the cells, and the means over them."""
    features, count = tower.features, tower.count
    side, rows = math.isqrt(features.shape[1]), round(math.sqrt(count))
    cell = torch.arange(count, device=features.device)
    firsts = torch.arange(rows, device=features.device) * count // rows
    row = (cell[:, None] >= firsts).sum(dim=1) - 1
    first, behind = row * count // rows, (row + 1) * count // rows
    column, columns = cell - first, behind - first
    middle = (2 * row + 1) * side // (2 * rows) * side + (2 * column + 1) * side // (2 * columns)
    area = _overlap(row, rows, side)[:, :, None] * _overlap(column, columns, side)[:, None]  # [n, side, side]
    weights = area.flatten(1) / area.sum(dim=(1, 2))[:, None]
    return middle.expand(features.shape[0], -1), weights.to(features.dtype) @ features


def _overlap(part: torch.Tensor, parts: torch.Tensor | int, side: int) -> torch.Tensor:
    """How much of each patch along an edge lies in a part of it, ``[n, side]`` float32."""
    patch = torch.arange(side, device=part.device)
    begin, end = (part * side / parts)[:, None], ((part + 1) * side / parts)[:, None]
    return (torch.minimum(end, patch + 1) - torch.maximum(begin, patch)).clamp(min=0)


def check(tokens: int, layers: int, has_cls: bool) -> str | None:
    """Why a tower does not fit, or None."""
    return (
        None
        if math.isqrt(tokens) ** 2 == tokens
        else f"its pictures have {tokens} patches, which are no square"
    )


_SCHEDULE = Schedule(layers=(), ratios=lambda a: (), entry=lambda a: a)

AVGPOOL = Method(
    name="avgpool",
    source="average pooling, a control for methods that choose",
    ranks_by="nothing",
    deleted=_SCHEDULE,
    routed=_SCHEDULE,
    reduction=Reduction(reduce, check),
)
