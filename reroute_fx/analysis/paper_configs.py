"""The configurations of the official Reroute release (9d42204), with what they truly cost."""

from dataclasses import dataclass

from ..config.routing_config import RoutingConfig
from ..methods.tiers import TIERS
from ..passes import ACTIONS
from .theory import LayerCost, PrefillCost, prefill_cost

RELEASED = ("fastv", "pdrop")
"""Methods of the release."""
_VARIANTS = {
    ("fastv", "physical_delete"): "fastv_K3",
    ("pdrop", "physical_delete"): "pdrop_earlyL2",
    ("fastv", "compact_route"): "ours_vs_fastv",
    ("pdrop", "compact_route"): "ours_vs_pdrop",
    ("fastv", "compact_route_stagewise"): "ours_vs_fastv_stagewise",
    ("pdrop", "compact_route_stagewise"): "ours_vs_pdrop_stagewise",
}


@dataclass(frozen=True)
class PaperDecoder:
    """Decoder of the 7B model that the release evaluates."""

    num_layers: int
    layer: LayerCost


PAPER_DECODERS = {
    "llava15": PaperDecoder(32, LayerCost.dense(4096, 32, 32, 11008)),
    "qwen25vl": PaperDecoder(28, LayerCost.dense(3584, 28, 4, 18944)),
}


@dataclass(frozen=True)
class PaperConfig:
    """One configuration of the release.

    Attributes:
        name: ``"<family>/avg<tier>/<variant>"``, or ``"<family>/baseline"``.
        family: ``"llava15"`` or ``"qwen25vl"``, the 7B models.
        num_layers: layers of its decoder.
        tier: tokens per layer that the name promises; None for the baseline.
        config: None for the baseline.
        average_tokens: visual tokens that truly enter a layer, at 576.
        cost: of a prefill with 576 visual and 40 text tokens in 16-bit precision.
    """

    name: str
    family: str
    num_layers: int
    tier: int | None
    config: RoutingConfig | None
    average_tokens: float
    cost: PrefillCost


def paper_configs() -> tuple[PaperConfig, ...]:
    """All 38 configurations: two unrouted baselines, and 2 models x 3 tiers x 6 variants."""
    table = []
    for family, decoder in PAPER_DECODERS.items():
        table.append(_entry(family, decoder, "baseline", None, None))
        for tier in TIERS:
            for action in ACTIONS:
                for method in RELEASED:
                    config = RoutingConfig.from_tier(
                        tier, method, action, "paper", num_layers=decoder.num_layers
                    )
                    name = f"avg{tier}/{_VARIANTS[method, action]}"
                    table.append(_entry(family, decoder, name, tier, config))
    return tuple(table)


def _entry(
    family: str, decoder: PaperDecoder, name: str, tier: int | None, config: RoutingConfig | None
) -> PaperConfig:
    average = config.average_tokens(decoder.num_layers) if config else 576.0
    cost = prefill_cost([decoder.layer] * decoder.num_layers, config)
    return PaperConfig(f"{family}/{name}", family, decoder.num_layers, tier, config, average, cost)
