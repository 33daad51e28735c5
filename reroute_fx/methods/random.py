"""Tokens chosen by chance: what any ranking rule has to beat. See `ChanceRule`."""

from ..rules import ChanceRule
from .method import Method, Schedule

RANDOM = Method(
    name="random",
    source="sanity check (UniPruneBench, arXiv 2511.02650)",
    ranks_by="chance",
    deleted=Schedule(layers=(3,), ratios=lambda a: (a,)),
    routed=Schedule(layers=(3, 7, 15, 23), ratios=lambda a: (a,) * 4),
    rank=ChanceRule(),
)
