"""PyramidDrop as the Reroute release runs it: fewer and fewer tokens, decided early and with their positions kept.

Official release of Reroute (arXiv 2606.12412) at 9d42204: ``pdrop_earlyL2`` and ``ours_vs_pdrop``. PyramidDrop's own
code (arXiv 2410.17247) decides later and counts positions anew: see `pdrop_official`.
"""

from .method import Method, Schedule

PDROP = Method(
    name="pdrop",
    source="PyramidDrop (arXiv 2410.17247) as released with Reroute (arXiv 2606.12412)",
    ranks_by="attention",
    deleted=Schedule(
        layers=(2, 7, 15, 23),
        ratios=lambda a: (a, a**2, a**3, a**4),
        published={
            192: (0.5965, 0.3558, 0.2123, 0.1266),
            128: (0.4570, 0.2088, 0.0954, 0.0436),
            64: (0.2789, 0.0937, 0.0315, 0.0106),
        },
    ),
    routed=Schedule(
        layers=(2, 7, 15, 23),
        ratios=lambda a: (a, a, a / 2, a / 4),
        published={
            192: (0.4502, 0.4502, 0.2251, 0.1126),
            128: (0.2655, 0.2655, 0.1328, 0.0664),
            64: (0.1392, 0.1392, 0.0696, 0.0348),
        },
    ),
)
