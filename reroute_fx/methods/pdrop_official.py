"""PyramidDrop as its authors run it (arXiv 2410.17247, github.com/Cooperx521/PyramidDrop).

Before layers 8, 16 and 24 the attention of the last token with that layer's query and keys ranks the tokens that are
left; 0.5, 0.25 and 0.125 of all stay. Positions are counted anew after each decision, and generated tokens have, in
each stage, the position after that stage's tokens. The authors only delete; routing keeps as many in each stage.
"""

from .method import Method, Schedule


def _shares(a: float) -> tuple[float, ...]:
    return a, a**2, a**3


PDROP_OFFICIAL = Method(
    name="pdrop-official",
    source="PyramidDrop (arXiv 2410.17247) as its authors run it",
    ranks_by="attention",
    deleted=Schedule(layers=(8, 16, 24), ratios=_shares),
    routed=Schedule(layers=(8, 16, 24), ratios=_shares),
    positions="contiguous",
    # 1, 0.5, 0.25 and 0.125 of the tokens in eight layers each.
    default_tier=0.46875,
)
