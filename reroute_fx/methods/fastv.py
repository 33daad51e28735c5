"""FastV as the Reroute release runs it: the same number in every stage, by the decision layer's own attention.

Official release of Reroute (arXiv 2606.12412) at 9d42204: ``fastv_K3`` deletes before layer 3, ``ours_vs_fastv`` routes
from there. FastV's own code (arXiv 2403.06764) asks the layer before: see `fastv_official`.
"""

from .method import Method, Schedule

FASTV = Method(
    name="fastv",
    source="FastV (arXiv 2403.06764) as released with Reroute (arXiv 2606.12412)",
    ranks_by="attention",
    deleted=Schedule(
        layers=(3,),
        ratios=lambda a: (a,),
        published={192: (0.2644,), 128: (0.1418,), 64: (0.01916,)},
    ),
    routed=Schedule(
        layers=(3, 7, 15, 23),
        ratios=lambda a: (a,) * 4,
        published={192: (0.2644,) * 4, 128: (0.1418,) * 4, 64: (0.01916,) * 4},
    ),
)
