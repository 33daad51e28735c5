"""Nüwa (arXiv 2602.02951): patches go in the vision tower, and most of the rest halfway down the decoder.

After the official code (github.com/Man-PaperRejected/Nuwa), which differs from the paper: patches are ranked by the
attention of CLS alone, not times the norm of their keys; pillars are above the 55th percentile of it, not the top
quarter by norm; the distance at which similarity stops to count is sqrt(280) of at most sqrt(1058) cells, not a
quarter; the second stage ranks by attention of the layer before, as FastV; positions are those of the grid, with gaps.

On Qwen2.5-VL, whose pictures have any size and whose tower has no CLS token, the same code ranks features of merged
patches by the attention that they receive from their whole frame in the last layer, keeps up to three of each region,
lets only the tenth that is attended to least take in others, and normalises all weights. It pads odd grids; regions at
their edges are cut off here, which is the same. It compares features in the order of attention windows with places in
the order of rows, a slip; here both are in the order of rows. Its shares are 0.1 more than the tier at the entry and
0.1 less behind the second stage, rounded. It takes one image; videos are refused here.

Routing has no official code: the same budget, decided before layers 16 and 23 of 32 by the layer's own attention.
"""

import math

import torch
import torch.nn.functional as F

from ..passes import GridStates, TowerStates
from .method import GridReduction, Method, Reduction, Schedule

REGION = 2
"""Cells along the edge of a region."""
PILLAR_PERCENTILE = 0.55
REACH = math.sqrt(280 / 1058)
"""Distance at which patches are no neighbours any more, as a share of the grid's diagonal."""
STATES = slice(16, 25)
"""Hidden states of which the mean is compared; the first is what enters the tower's first layer."""
GRID_PILLAR_PERCENTILE = 0.1
GRID_REACH = 0.8
GRID_STATES = slice(8, 25)
GRID_OF_REGION = 3
"""Features of a region that compete at least."""
_SHARE = 1 / 7  # of the tokens that entered stay in the second stage: 16 of 112, 32 of 224, 48 of 336


def reduce(tower: TowerStates) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the patches that CLS attends to, spread over the grid, and let them take in their like."""
    features, tokens = tower.features, tower.features.shape[1]
    side = math.isqrt(tokens)
    metric = cls_attention(tower)  # [B, N]
    indices = _spread_best(metric, side, tower.count)  # [B, n]
    patches = torch.stack(list(tower.states[STATES])).float().mean(dim=0)[:, -tokens:]
    alike = F.normalize(patches, dim=-1)
    kept = alike.gather(1, indices[..., None].expand(-1, -1, alike.shape[2]))
    near = _nearness(side, alike.device).to(alike.dtype)[indices]  # [B, n, N]
    weights = F.relu(kept @ alike.transpose(1, 2)) * near
    is_self = torch.arange(tokens, device=indices.device) == indices[..., None]
    is_pillar = _above_percentile(metric.gather(1, indices))
    weights = weights.masked_fill(is_pillar[..., None] & ~is_self, 0.0)
    weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-8)
    weights = weights.masked_fill(is_self, 1.0)
    return indices, weights.to(features.dtype) @ features


def cls_attention(tower: TowerStates) -> torch.Tensor:
    """Attention of the first token on each patch, summed over heads, `[B, N]` float32."""
    assert tower.query is not None  # `check` refuses towers without
    logits = tower.query.float() @ tower.keys.float().transpose(2, 3) * tower.scale  # [B, H, 1, 1 + N]
    return logits.softmax(dim=-1)[:, :, 0, 1:].sum(dim=1)


def _spread_best(metric: torch.Tensor, side: int, count: int) -> torch.Tensor:
    """The best patches of those that are among the best of their region, ascending."""
    cells = side // REGION
    of_region = metric.view(-1, cells, REGION, cells, REGION).transpose(2, 3).flatten(3)  # [B, c, c, 4]
    each = math.ceil(count / cells**2)
    place = of_region.topk(each, dim=-1).indices  # [B, c, c, each]
    rows = torch.arange(cells, device=metric.device)
    first = rows[:, None] * REGION * side + rows * REGION  # of each region
    candidates = (first[..., None] + place // REGION * side + place % REGION).flatten(1)
    best = metric.gather(1, candidates).topk(count, dim=1).indices
    return candidates.gather(1, best).sort(dim=1).values


def _nearness(side: int, device: torch.device) -> torch.Tensor:
    """1 for a patch itself, falling to 0 at the reach, ``[N, N]``."""
    cells = torch.arange(side * side, device=device)
    down, across = (cells // side).float(), (cells % side).float()
    squared = (down[:, None] - down) ** 2 + (across[:, None] - across) ** 2
    reach = REACH * math.sqrt(2) * (side - 1)
    return 1 - (squared.sqrt() / reach).clamp(max=1)


def _above_percentile(scores: torch.Tensor) -> torch.Tensor:
    """Which scores of a row are at or above its percentile, interpolated between neighbours."""
    place = PILLAR_PERCENTILE * (scores.shape[1] - 1)
    below = math.floor(place)
    ordered = scores.sort(dim=1).values
    low, high = ordered[:, below : below + 1], ordered[:, math.ceil(place) : math.ceil(place) + 1]
    return scores >= low + (high - low) * (place - below)


def reduce_grid(tower: GridStates) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the features that their frame attends to, spread over it, and let those of the least attention take in
    their like.
    """
    is_feature = tower.frames >= 0  # [F, L]
    metric, cells = tower.by_frame(tower.received), tower.by_frame(tower.cells)
    region = cells // REGION
    neighbours = (region[:, :, None] == region[:, None]).all(dim=-1)  # [F, L, L]
    most = max(GRID_OF_REGION, math.ceil(REGION**2 * tower.share))
    competes = is_feature & (_rank(metric, neighbours & is_feature[:, None]) < most)
    rank = _rank(metric, competes[:, None])
    stays = competes & (rank < tower.counts[:, None])
    is_pillar = metric >= _percentile(metric, rank, stays)[:, None]
    alike = F.normalize(tower.by_frame(tower.compared).float(), dim=-1)
    weights = F.relu(alike @ alike.transpose(1, 2)) * _nearness_in_frames(cells)  # [F, L, L]
    is_self = torch.eye(metric.shape[1], dtype=torch.bool, device=metric.device)
    weights = weights.masked_fill(is_pillar[..., None] & ~is_self, 0.0)
    weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-8)
    features = tower.by_frame(tower.features)
    return tower.in_order(stays), tower.in_order(weights.to(features.dtype) @ features)


def _rank(metric: torch.Tensor, rivals: torch.Tensor) -> torch.Tensor:
    """How many of its rivals come before each feature, ``[F, L]``; counted, for TensorRT sorts few values only."""
    place = torch.arange(metric.shape[1], device=metric.device)
    mine, other = metric[:, :, None], metric[:, None]
    before = (other > mine) | ((other == mine) & (place < place[:, None]))  # [F, L, L]
    return (rivals & before).sum(dim=-1)


def _percentile(metric: torch.Tensor, rank: torch.Tensor, stays: torch.Tensor) -> torch.Tensor:
    """Percentile of the scores that stay, interpolated between neighbours, ``[F]``; `rank` counts from the best."""
    last = stays.sum(dim=1) - 1
    place = GRID_PILLAR_PERCENTILE * last.float()
    low, high = (
        (metric * (stays & (rank == (last - end.long())[:, None]))).sum(dim=1)
        for end in (place.floor(), place.ceil())
    )
    return low + (high - low) * (place - place.floor())


def _nearness_in_frames(cells: torch.Tensor) -> torch.Tensor:
    """1 for a feature itself, falling to 0 at the reach, a share of the diagonal of the frame, ``[F, L, L]``."""
    apart = (cells[:, :, None] - cells[:, None]).float().square().sum(dim=-1).sqrt()
    edges = (cells.amax(dim=1) + REGION) // REGION * REGION - 1  # of the frame, up to whole regions
    reach = GRID_REACH * edges.float().square().sum(dim=-1).sqrt()  # [F]
    return 1 - (apart / reach[:, None, None]).clamp(max=1)


def check(tokens: int, layers: int, has_cls: bool) -> str | None:
    """Why a tower does not fit, or None."""
    side = math.isqrt(tokens)
    if not has_cls:
        return "its tower has no CLS token, whose attention ranks the patches"
    if layers + 1 < STATES.stop:
        return f"its tower has {layers} layers, but hidden states up to layer {STATES.stop - 1} are compared"
    if side * side != tokens or side % REGION:
        return f"its pictures have {tokens} patches, which are no square of an even edge"
    return None


def check_grid(layers: int) -> str | None:
    """Why a tower does not fit, or None."""
    if layers + 1 < GRID_STATES.stop:
        return f"its tower has {layers} layers, but hidden states up to layer {GRID_STATES.stop - 1} are compared"
    return None


def _grid_entry(a: float) -> float:
    return 0.8 * a + 0.2


def _grid_ratio(a: float) -> float:
    return 0.8 * a / _grid_entry(a)


NUWA = Method(
    name="nuwa",
    source="Nüwa (arXiv 2602.02951) as its authors' code runs it on LLaVA and Qwen2.5-VL",
    ranks_by="attention",
    deleted=Schedule(layers=(16,), ratios=lambda a: (_SHARE,), entry=lambda a: a, scoring="previous"),
    routed=Schedule(layers=(16, 23), ratios=lambda a: (_SHARE,) * 2, entry=lambda a: a),
    reduction=Reduction(reduce, check),
    grids=GridReduction(
        reduce_grid,
        check_grid,
        GRID_STATES,
        deleted=Schedule(
            layers=(16,),
            ratios=lambda a: (_grid_ratio(a),),
            entry=_grid_entry,
            scoring="previous",
            published={0.25: (0.35, 0.42), 0.5: (0.6, 0.66), 0.75: (0.85, 0.7)},
        ),
        routed=Schedule(layers=(16, 23), ratios=lambda a: (_grid_ratio(a),) * 2, entry=_grid_entry),
    ),
)
