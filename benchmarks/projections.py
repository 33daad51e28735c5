"""The projections of docs/performance.md: what the peak rates of GPUs allow decoders of 7B and 72B, nothing measured.

    python benchmarks/projections.py

prints the table, from the published sizes of the decoders of LLaVA-1.5-7B and Qwen2.5-VL-72B and of the GPUs.
"""

import typer

from reroute_fx import RoutingConfig
from reroute_fx.analysis.roofline import BATCHES, GPUS, Gpu, project
from reroute_fx.analysis.routing_report import RoutingReport
from reroute_fx.analysis.theory import LayerCost

TIERS = (192, 128, 64)
DECODERS = {
    "7B": (32, LayerCost.dense(4096, 32, 32, 11008)),
    "72B": (80, LayerCost.dense(8192, 64, 8, 29568)),
}
"""Depth and layer, by size."""


def report(size: str, tier: int) -> RoutingReport:
    """Of a decoder at a tier, for 576 visual and 40 text tokens."""
    depth, layer = DECODERS[size]
    return RoutingReport(RoutingConfig.from_tier(tier, num_layers=depth), (), (layer,) * depth, 2)


def cell(size: str, gpu: Gpu, batch: int, what: str) -> str:
    """Milliseconds unrouted, and how many times faster each tier is."""
    found = [project(report(size, tier), gpu, batch) for tier in TIERS]
    if not all(each.fits[0] for each in found):
        return "doesn't fit"
    unrouted = getattr(found[0], what)[0]
    times = " / ".join(f"{unrouted / getattr(each, what)[1]:.2f}" for each in found)
    return f"{1e3 * unrouted:.1f} ms: {times}"


def markdown_table() -> str:
    """A row for each decoder and GPU that holds it."""
    heads = [f"{what}, batch {batch}" for what in ("prefill", "step") for batch in BATCHES]
    lines = [f"| decoder, GPU | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for size in DECODERS:
        for gpu in GPUS.values():
            cells = [cell(size, gpu, batch, what) for what in ("prefill", "step") for batch in BATCHES]
            if set(cells) != {"doesn't fit"}:
                lines.append(f"| {size}, {gpu.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(lambda: print(markdown_table()))
