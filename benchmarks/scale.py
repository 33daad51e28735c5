"""What a prefill costs as prompts, decoders and batches grow: compiled without routing, and routed at each tier.

    python benchmarks/scale.py [--num-iters 5] [--width 512] [--output-json scale_cpu.json]

One size grows at a time; the others stay at 576 visual tokens, 16 layers and one row. The same compiled programs
serve all prompts and batches. A contender grows faster than theory where its time, divided by its FLOPs, is larger
than at the smallest size: the JSON has the factor for each size and the largest one.
"""

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from decoders import Prefill, Prompts
from matplotlib.figure import Figure
from models import build
from record import RESULTS, NumIters, OutputJson, alternate, first_calls, number_table, ratio, save, summary
from rich.console import Console
from rich.table import Table

from reroute_fx import RoutingConfig
from reroute_fx._compat import settle_cpu_math
from reroute_fx.capture import capture_decoder

TEXT = 40
TOKENS = (144, 256, 576, 1024, 2304, 4096)
DEPTHS = (16, 24, 32, 48)
BATCHES = (1, 2, 4, 8)
USUAL = (576, 16, 1)
"""Visual tokens, layers, rows."""
TIERS = (192, 128, 64)
UNROUTED = "compiled unrouted"
SWEEPS = {"visual tokens": TOKENS, "layers": DEPTHS, "rows": BATCHES}
COLOURS = {UNROUTED: "#4878a8", "routed 192": "#f2b880", "routed 128": "#e07b39", "routed 64": "#9c4a14"}


def contenders(width: int, layers: int) -> dict[str, Prefill]:
    captured = capture_decoder(build(width, layers))
    configs = {f"routed {tier}": RoutingConfig.from_tier(tier, num_layers=layers) for tier in TIERS}
    routed = {name: Prefill(captured, config) for name, config in configs.items()}
    return {UNROUTED: Prefill(captured, None), **routed}


def sizes_of(sweep: str) -> list[tuple[int, int, int]]:
    """Visual tokens, layers and rows of each point."""
    place = list(SWEEPS).index(sweep)
    return [(*USUAL[:place], size, *USUAL[place + 1 :]) for size in SWEEPS[sweep]]


def measure(
    made: dict[int, dict[str, Prefill]], width: int, rounds: int
) -> dict[tuple[int, int, int], dict[str, list[float]]]:
    """Seconds of each contender in each round, at all sizes; `made` are the contenders of each depth."""
    samples = {}
    for size in dict.fromkeys(size for sweep in SWEEPS for size in sizes_of(sweep)):
        visual, layers, rows = size
        prompts = Prompts.random(rows, visual, TEXT, width)
        runs: dict[str, Callable[[], Any]] = {
            name: partial(prefill, prompts) for name, prefill in made[layers].items()
        }
        first_calls(runs)
        samples[size] = alternate(runs, rounds)
    return samples


def flops(size: tuple[int, int, int], prefills: dict[str, Prefill]) -> dict[str, int]:
    """Theoretical FLOPs of each contender."""
    visual, _, rows = size
    costs = {
        name: prefill.report.at(visual_tokens=visual, text_tokens=TEXT)
        for name, prefill in prefills.items()
        if prefill.config
    }
    routed = {name: rows * cost.routed.flops for name, cost in costs.items()}
    return {UNROUTED: rows * next(iter(costs.values())).unrouted.flops, **routed}


def curves(
    samples: dict[tuple[int, int, int], dict[str, list[float]]], made: dict[int, dict[str, Prefill]]
) -> dict[str, Any]:
    """For each sweep and contender what each size took, and how it grew next to theory."""
    found: dict[str, Any] = {}
    for sweep, points in SWEEPS.items():
        for point, size in zip(points, sizes_of(sweep), strict=True):
            theory = flops(size, made[size[1]])
            for name, seconds in samples[size].items():
                row = {"size": point, **summary(seconds), "flops": theory[name]}
                row["speedup_over_compiled"] = ratio(samples[size][UNROUTED], seconds)
                row["theoretical_speedup"] = theory[UNROUTED] / theory[name]
                rows = found.setdefault(sweep, {}).setdefault(name, [])
                rows.append(row)
                row["growth"] = row["p50_ms"] / rows[0]["p50_ms"]
                row["growth_over_theory"] = row["growth"] / (row["flops"] / rows[0]["flops"])
    return found


def plot(found: dict[str, Any], path: Path, title: str) -> None:
    figure = Figure(figsize=(13, 4.6), dpi=120, layout="constrained")
    for chart, (sweep, lines) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        for name, rows in lines.items():
            sizes, times = [row["size"] for row in rows], [row["p50_ms"] for row in rows]
            chart.plot(sizes, times, marker="o", markersize=4, color=COLOURS[name], label=name)
            theory = [times[0] * row["flops"] / rows[0]["flops"] for row in rows]
            chart.plot(sizes, theory, linestyle="dotted", linewidth=1, color=COLOURS[name])
        chart.set_xscale("log", base=2)
        chart.set_yscale("log")
        chart.set_xticks(SWEEPS[sweep], [str(size) for size in SWEEPS[sweep]])
        chart.minorticks_off()
        chart.set_xlabel(sweep)
        chart.grid(alpha=0.3)
        chart.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("prefill, milliseconds, p50")
    figure.axes[0].legend(frameon=False)
    figure.suptitle(title)
    figure.supxlabel("dotted: as the FLOPs grow, from the first size on", fontsize=9)
    figure.savefig(path)


def main(
    num_iters: NumIters = 5,
    width: Annotated[int, typer.Option(help="hidden size")] = 512,
    output_json: OutputJson = RESULTS / "scale_cpu.json",
) -> None:
    """Measure, and write what was measured with a plot beside it."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="scale_")
    settle_cpu_math()
    torch._logging.set_logs(all=40)
    made = {layers: contenders(width, layers) for layers in DEPTHS}
    samples = measure(made, width, num_iters)
    found = curves(samples, made)
    fastest = {
        sweep: {name: max(row["growth_over_theory"] for row in rows) for name, rows in lines.items()}
        for sweep, lines in found.items()
    }
    setting = {"width": width, "text_tokens": TEXT, "dtype": "float32", "usual": USUAL}
    raw = {" x ".join(map(str, size)): seconds for size, seconds in samples.items()}
    path = save(
        output_json,
        {"setting": setting, "largest_growth_over_theory": fastest, "curves": found, "seconds": raw},
    )
    plot(
        found,
        output_json.with_suffix(".png"),
        f"LLaVA-like decoder, d {width}, float32, {torch.get_num_threads()} threads",
    )
    tables = [_table(sweep, lines) for sweep, lines in found.items()]
    Console(width=120).print(
        *tables, f"largest growth over theory: {fastest}", f"written to {path}", sep="\n"
    )


def _table(sweep: str, lines: dict[str, list[dict[str, Any]]]) -> Table:
    table = number_table(f"p50 ms, by {sweep}", *(str(size) for size in SWEEPS[sweep]))
    for name, rows in lines.items():
        table.add_row(name, *(f"{row['p50_ms']:.0f}" for row in rows))
        if name != UNROUTED:
            pairs = ((row["speedup_over_compiled"], row["theoretical_speedup"]) for row in rows)
            table.add_row("  x compiled (theory)", *(f"{x:.2f} ({theory:.2f})" for x, theory in pairs))
    return table


if __name__ == "__main__":
    typer.run(main)
