"""Prefill with the configurations that `tune` found for the shipped model, and with the exact schedule of their tiers.

    python benchmarks/tuned_prefill.py [--num-iters 25] [--width 768]

They are to cost the same. Both run on a LLaVA decoder of as many layers with random weights, compiled, alternating in
one run, first token and scoring included. FLOPs by theory stand beside the measured times.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from models import build, llava_prompts
from record import RESULTS, NumIters, OutputJson, alternate, first_calls, number_table, ratio, save, summary
from rich.console import Console

import reroute_fx
from reroute_fx import RoutingConfig
from reroute_fx._compat import settle_cpu_math
from reroute_fx.config.choosing import read_config

TIERS = (192, 128, 64)
VISUAL, TEXT = 576, 40


def configurations(layers: int, folder: Path) -> dict[str, RoutingConfig]:
    """By name, of each tier the exact schedule and what was found."""
    found = {}
    for tier in TIERS:
        found[f"exact {tier}"] = RoutingConfig.from_tier(tier, num_layers=layers)
        found[f"tuned {tier}"] = read_config(folder / f"tuned_{tier}.json")
    return found


def main(
    num_iters: NumIters = 25,
    width: Annotated[int, typer.Option(min=64, help="of the decoder")] = 768,
    folder: Annotated[Path, typer.Option(help="where the configurations are")] = RESULTS,
    output_json: OutputJson = RESULTS / "tuned_prefill_cpu.json",
) -> None:
    """Measure, print and write."""
    settle_cpu_math()
    layers = 16
    model = build(width, layers)
    inputs = llava_prompts(model, 1, 1, TEXT)
    runs: dict[str, Callable[[], Any]] = {}
    flops = {}
    for name, config in configurations(layers, folder).items():
        routed = reroute_fx.compile(model, config=config)
        report = routed.report.at(visual_tokens=VISUAL, text_tokens=TEXT)
        flops[name] = report.routed.flops
        runs[name] = torch.no_grad()(partial(routed, **inputs, logits_to_keep=1))
    first_calls(runs)
    samples = alternate(runs, num_iters)
    table = number_table("tier", "FLOPs", "time", "p50 of exact", "p50 of tuned", title="tuned to exact")
    rows = []
    for tier in TIERS:
        exact, tuned = f"exact {tier}", f"tuned {tier}"
        row = {
            "tier": tier,
            "flops": flops[tuned] / flops[exact],
            "time": ratio(samples[tuned], samples[exact]),
            "exact": summary(samples[exact]),
            "tuned": summary(samples[tuned]),
        }
        rows.append(row)
        times = (f"{row[name]['p50_ms']:.1f} ms" for name in ("exact", "tuned"))
        table.add_row(str(tier), f"{row['flops']:.4f}", f"{row['time']:.3f}", *times)
    Console().print(table)
    save(output_json, {"width": width, "layers": layers, "rows": rows, "samples": samples})


if __name__ == "__main__":
    typer.run(main)
