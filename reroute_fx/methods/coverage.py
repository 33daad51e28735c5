"""Coverage: spread out early, by attention late.

Early layers don't know yet where to look; what they defer by mistake may be lost for all that follows. So half of what
the first two decisions keep lies on a lattice, and attention chooses the rest; later decisions are left to attention.
Layers and shares are those of `pdrop`. When routing, the second lattice lies between the cells of the first; when
deleting it is the same, for the others are gone.
"""

from ..rules import AttentionRule, LatticeRule, Rule, UnionRule
from .method import Method, Schedule


def _rules(second_shift: int) -> tuple[Rule, ...]:
    attention = AttentionRule()
    lattices = LatticeRule(), LatticeRule(shift=(second_shift, second_shift))
    return (*(UnionRule(lattice, attention, share=0.5) for lattice in lattices), attention, attention)


COVERAGE = Method(
    name="coverage",
    source="lattice and attention early, attention late; not published elsewhere",
    ranks_by="union",
    deleted=Schedule(layers=(2, 7, 15, 23), ratios=lambda a: (a, a**2, a**3, a**4), rules=_rules(0)),
    routed=Schedule(layers=(2, 7, 15, 23), ratios=lambda a: (a, a, a / 2, a / 4), rules=_rules(1)),
)
