"""Value similarity: tokens whose values are like those of the question stay.

No rotary position and no key takes part, so that nothing has to be known of the model's heads and layers; what ranks is
the text part of IVC-Prune (arXiv 2602.03060) at the layers and shares of `pdrop`.
"""

from ..rules import ValueRule
from .method import Method, Schedule

_RULES = (ValueRule(),) * 4

VALUE_SIMILARITY = Method(
    name="value-similarity",
    source="values instead of attention, after IVC-Prune (arXiv 2602.03060)",
    ranks_by="values",
    deleted=Schedule(layers=(2, 7, 15, 23), ratios=lambda a: (a, a**2, a**3, a**4), rules=_RULES),
    routed=Schedule(layers=(2, 7, 15, 23), ratios=lambda a: (a, a, a / 2, a / 4), rules=_RULES),
)
