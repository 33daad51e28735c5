"""FastV as its authors run it (arXiv 2403.06764, github.com/pkunlp-icler/FastV).

Before layer K the last token's attention in layer K - 1, mean over heads, ranks the visual tokens; the best stay, at
their positions. With a cache the authors rank once, for the prompt, as here. K is 2 or 3, and half the tokens stay.
The authors only delete; routing with their ranking decides again where the Reroute release does.
"""

from .method import Method, Schedule


def _fastv(k: int, default_tier: float) -> Method:
    return Method(
        name=f"fastv-official-k{k}",
        source=f"FastV (arXiv 2403.06764) as its authors run it, K = {k}",
        ranks_by="attention",
        deleted=Schedule(layers=(k,), ratios=lambda a: (a,), scoring="previous"),
        routed=Schedule(layers=(k, 7, 15, 23), ratios=lambda a: (a,) * 4, scoring="previous"),
        default_tier=default_tier,
    )


# Half the tokens from layer K on, averaged over 32 layers.
FASTV_OFFICIAL_K2 = _fastv(2, default_tier=(2 + 30 * 0.5) / 32)
FASTV_OFFICIAL_K3 = _fastv(3, default_tier=(3 + 29 * 0.5) / 32)
