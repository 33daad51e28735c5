"""What the peak rates of a GPU allow a decoder: a projection, nothing measured.

A layer takes the longer of two times: its FLOPs at `ARITHMETIC_SHARE` of the GPU's dense bfloat16 rate, and the bytes
of its weights, keys and values at `BANDWIDTH_SHARE` of the memory's rate (the roofline of Williams et al., CACM 52(4),
2009). Left out are the vision tower, the head, activations, launches, and compaction; scoring is counted.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from ..errors import ConfigError
from .routing_report import RoutingReport

ARITHMETIC_SHARE, BANDWIDTH_SHARE = 0.6, 0.8
"""Of the peaks, as assumed: what large matrix products and long copies reach."""
BATCHES = (1, 8, 32)
_BYTES = 2
"""Of a bfloat16 number."""
_ROOM = 0.9
"""Share of the memory for layers and caches; the rest is for what is left out."""


@dataclass(frozen=True)
class Gpu:
    """Published figures of a GPU.

    Attributes:
        name: with its form.
        flops: dense bfloat16 FLOPs per second.
        bandwidth: of its memory, bytes per second.
        memory: bytes.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float


GPUS = {
    "a100": Gpu("A100 SXM 80 GB", 312e12, 2.039e12, 80e9),
    "h100": Gpu("H100 SXM", 989e12, 3.35e12, 80e9),
    "h200": Gpu("H200 SXM", 989e12, 4.8e12, 141e9),
    "b200": Gpu("B200 in a DGX", 2250e12, 8e12, 180e9),
    "l4": Gpu("L4", 121e12, 0.3e12, 24e9),
}
"""By name, from NVIDIA's data sheets; half of the rates that they give for sparse matrices."""


@dataclass(frozen=True)
class Projection:
    """Seconds that a batch of equal prompts takes, unrouted and routed.

    Attributes:
        batch: rows.
        fits: whether weights, keys and values fit into nine tenths of the memory, unrouted and routed.
        prefill: of the decoder's layers, unrouted and routed.
        step: one token for each row behind the prompts, unrouted and routed.
    """

    batch: int
    fits: tuple[bool, bool]
    prefill: tuple[float, float]
    step: tuple[float, float]


def find_gpu(name: str) -> Gpu:
    """A GPU by its name.

    Raises:
        ConfigError: it is not known.
    """
    if name not in GPUS:
        raise ConfigError(f"gpu is {name!r}; expected one of {', '.join(GPUS)}.")
    return GPUS[name]


def project(report: RoutingReport, gpu: Gpu, batch: int) -> Projection:
    """What `gpu` allows a batch of prompts of the report's size.

    Raises:
        ConfigError: the FLOPs of the report are not all.
    """
    if report.uncounted:
        raise ConfigError(
            f"gpu is given, but the FLOPs leave out {', '.join(report.uncounted)}; expected a decoder and rules of "
            f"which all is counted. Leave gpu out."
        )
    unrouted = (report.visual_tokens,) * report.num_layers
    runs = [
        _run(report, gpu, batch, tokens, scoring)
        for tokens, scoring in (
            (unrouted, 0),
            (report.tokens_per_layer, report.routed.scoring_flops),
        )
    ]
    fits, prefill, step = zip(*runs, strict=True)
    return Projection(batch, fits, prefill, step)


def _run(
    report: RoutingReport, gpu: Gpu, batch: int, tokens: Sequence[int], scoring: int
) -> tuple[bool, float, float]:
    rows = [count + report.text_tokens for count in tokens]
    prefill = _seconds(gpu, batch * scoring, 0)
    step = memory = 0.0
    for layer, row in zip(report.layers, rows, strict=True):
        # A prompt writes keys and values, and each later token reads them.
        moved = layer.linear * _BYTES + batch * layer.kv_bytes(row, _BYTES)
        prefill += _seconds(gpu, batch * layer.flops(row), moved)
        step += _seconds(gpu, batch * (2 * layer.linear + 4 * layer.attention_width * row), moved)
        memory += moved
    return memory <= _ROOM * gpu.memory, prefill, step


def _seconds(gpu: Gpu, flops: float, moved: float) -> float:
    return max(flops / (ARITHMETIC_SHARE * gpu.flops), moved / (BANDWIDTH_SHARE * gpu.bandwidth))


def projection_table(report: RoutingReport, gpu: Gpu) -> Table:
    """Milliseconds for each batch, for people."""
    table = Table(
        "batch",
        "prefill, ms",
        "routed",
        "times faster",
        "step, ms",
        "routed",
        "times faster",
        title=f"Projection for an {gpu.name}, nothing measured",
        caption=(
            f"longer of FLOPs at {ARITHMETIC_SHARE:.0%} of {gpu.flops / 1e12:.0f} TFLOPS (bfloat16, dense) and bytes "
            f"at {BANDWIDTH_SHARE:.0%} of {gpu.bandwidth / 1e12:.2f} TB/s; decoder layers only"
        ),
    )
    for column in table.columns:
        column.justify = "right"
    for batch in BATCHES:
        found = project(report, gpu, batch)
        cells = [str(batch)]
        for unrouted, routed in (found.prefill, found.step):
            cells += [f"{1e3 * unrouted:.1f}", f"{1e3 * routed:.1f}", f"{unrouted / routed:.2f}"]
        if not all(found.fits):
            cells[0] += " (unrouted doesn't fit)" if found.fits[1] else " (doesn't fit)"
        table.add_row(*cells)
    return table


def projection_dict(report: RoutingReport, gpu: Gpu) -> dict[str, Any]:
    """The same as plain values, seconds."""
    return {
        "gpu": asdict(gpu),
        "arithmetic_share": ARITHMETIC_SHARE,
        "bandwidth_share": BANDWIDTH_SHARE,
        "batches": [asdict(project(report, gpu, batch)) for batch in BATCHES],
    }
