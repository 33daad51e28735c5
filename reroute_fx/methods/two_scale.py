"""Two scales: all of the picture coarsely while attention can't tell yet what matters, and what it ranks first in full.

A picture is cut into blocks. The token in the middle of each carries the mean of its block from the first layer on, at
its own position, and the first two decisions keep it whatever its score. The rest of the budget goes to the tokens with
the highest attention in the decision layer, as with `pdrop`; half as many in the last quarter of the layers.
"""

from .method import Method, Schedule


def _block(share: float) -> int:
    """Blocks take less than half of what the first decisions keep; at tier 64 there is room for a quarter as many."""
    return 3 if share >= 0.2 else 6


_SCHEDULE = Schedule(
    layers=(2, 8, 16, 24), ratios=lambda a: (a, a, a, a / 2), block=_block, block_decisions=2
)

TWO_SCALE = Method(
    name="two-scale",
    source="pooled blocks early, routed tokens throughout; made for this package",
    ranks_by="attention",
    deleted=_SCHEDULE,
    routed=_SCHEDULE,
)
