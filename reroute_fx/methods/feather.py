"""FEATHER as its authors run it (arXiv 2412.13180, github.com/markendo/FEATHER).

Before layer 8 the last token's attention in the layer before, without rotary positions and among visual tokens alone,
ranks them; the best 30 % stay, and every third row and column of the picture. Before layer 16 the same attention keeps
9 % of what is left. Positions stay. How many tokens both parts of the first decision share depends on the picture
there; here as many stay as do on average if they share none but by chance: 1/9 + 0.3 * 8/9 = 17/45, of which the
lattice is 5/17. Tiers scale both decisions alike. The authors only delete; routing decides at the same layers.
"""

from ..rules import AttentionRule, LatticeRule, UnionRule
from .method import Method, Schedule

_attention = AttentionRule(layer="previous", rotary=False, among="visual")
_schedule = Schedule(
    layers=(8, 16),
    ratios=lambda a: (a, 0.09 * a),
    rules=(UnionRule(LatticeRule(stride=3), _attention, share=5 / 17), _attention),
)

FEATHER = Method(
    name="feather",
    source="FEATHER (arXiv 2412.13180) as its authors run it, with the expected count",
    ranks_by="union",
    deleted=_schedule,
    routed=_schedule,
    # 17/45 of 576 tokens from layer 8 on, 9 % of these from layer 16.
    default_tier=(8 * 576 + 8 * 217 + 16 * 19) / (32 * 576),
)
