"""Prefill of a 32-layer LLaVA decoder: eager, compiled, and routed at each tier, alternating in one run.

    python benchmarks/prefill.py [--rounds 15] [--width 1024] [--out prefill_cpu]

Baselines: the Hugging Face decoder in eager mode, the same decoder under `torch.compile`, and the captured
decoder through this project's compiler without routing. All fill a key-value cache. The routing efficiency is
the measured speed-up over the *faster* compiled baseline divided by the theoretical FLOP ratio, scoring
counted. Peak memory is read from the kernel, each contender in a process of its own.
"""

import os
import tempfile
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from models import build
from record import alternate, first_calls, measure_memory, peak_memory, ratio, summary, write
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, LlavaForConditionalGeneration

from reroute_fx import RoutingConfig
from reroute_fx._compat import settle_cpu_math
from reroute_fx.capture import capture_decoder
from reroute_fx.lowering import lower
from reroute_fx.plan import plan_rows
from reroute_fx.routing import route, unrouted

VISUAL, TEXT = 576, 40
TIERS = (192, 128, 64)
COMPILED = ("torch.compile", "compiled unrouted")


def contenders(model: LlavaForConditionalGeneration) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """What is measured, and the report of each routed contender."""
    length = VISUAL + TEXT
    embeds = torch.randn(1, length, model.config.text_config.hidden_size)
    positions = torch.arange(length)[None]
    is_visual = torch.zeros(1, length, dtype=torch.bool)
    is_visual[:, 5 : 5 + VISUAL] = True
    decoder = model.model.language_model
    captured = capture_decoder(model)

    def hugging_face(run: Callable[..., Any]) -> Callable[[], Any]:
        return torch.no_grad()(lambda: run(inputs_embeds=embeds, position_ids=positions, use_cache=True))

    def ours(program: torch.export.ExportedProgram, **inputs: torch.Tensor) -> Callable[[], Any]:
        executable = lower(program)

        def run() -> DynamicCache:
            routing = executable(inputs_embeds=embeds, position_ids=positions, **inputs)["routing"]
            cache = DynamicCache(config=decoder.config)
            for i in range(captured.num_layers):
                cache.update(routing[f"key.{i}"], routing[f"value.{i}"], i)
            return cache

        return run

    runs = {
        "eager": hugging_face(decoder),
        "torch.compile": hugging_face(torch.compile(decoder)),
        "compiled unrouted": ours(unrouted(captured.program, captured.num_layers)),
    }
    reports = {}
    for tier in TIERS:
        config = RoutingConfig.from_tier(tier, num_layers=captured.num_layers)
        program, report = route(captured.program, config, num_layers=captured.num_layers)
        runs[f"routed {tier}"] = ours(program, **plan_rows(config, is_visual, [length], [[VISUAL]]).inputs)
        reports[f"routed {tier}"] = report.at(visual_tokens=VISUAL, text_tokens=TEXT)
    return runs, reports


def main(
    rounds: Annotated[int, typer.Option(help="measured rounds")] = 15,
    width: Annotated[int, typer.Option(help="hidden size")] = 1024,
    layers: Annotated[int, typer.Option(help="decoder layers")] = 32,
    out: Annotated[str, typer.Option(help="name of the JSON")] = "prefill_cpu",
    memory: Annotated[bool, typer.Option(help="measure peak memory too")] = True,
    memory_of: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure and write benchmarks/results/<out>.json."""
    if not memory_of:
        # An empty cache, so that first calls are cold; the processes that measure memory inherit it.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="prefill_")
    settle_cpu_math()
    torch._logging.set_logs(all=40)
    runs, reports = contenders(build(width, layers))
    if memory_of:
        print(measure_memory(runs[memory_of]))
        return
    first = first_calls(runs)
    samples = alternate(runs, rounds)
    baseline = min(COMPILED, key=lambda name: summary(samples[name])["p50_ms"])
    rows = {}
    for name in runs:
        row: dict[str, Any] = {"first_call_s": first[name], **summary(samples[name])}
        row["speedup_over_eager"] = ratio(samples["eager"], samples[name])
        row["speedup_over_compiled"] = ratio(samples[baseline], samples[name])
        if name in reports:
            report = reports[name]
            row["average_tokens"] = report.average_tokens
            row["theoretical_speedup"] = report.unrouted.flops / report.routed.flops
            row["efficiency"] = row["speedup_over_compiled"] / row["theoretical_speedup"]
        if memory:
            arguments = ["--width", str(width), "--layers", str(layers), "--memory-of", name]
            row["peak_memory_mib"] = peak_memory(__file__, arguments) / 2**20
        rows[name] = row
    setting = {
        "width": width,
        "layers": layers,
        "visual_tokens": VISUAL,
        "text_tokens": TEXT,
        "dtype": "float32",
    }
    record = {"setting": setting, "compiled_baseline": baseline, "rows": rows, "seconds": samples}
    path = write(out, record)
    Console(width=120).print(_table(rows), f"compiled baseline: {baseline}", f"written to {path}", sep="\n")


def _table(rows: dict[str, dict[str, Any]]) -> Table:
    table = Table(
        "", "p50 ms", "p99 ms", "x eager", "x compiled", "theory", "efficiency", "peak MiB", "first call s"
    )
    for name, row in rows.items():
        cells = [f"{row['p50_ms']:.0f}", f"{row['p99_ms']:.0f}", f"{row['speedup_over_eager']:.2f}"]
        cells.append(f"{row['speedup_over_compiled']:.2f}")
        cells += [f"{row[k]:.2f}" if k in row else "" for k in ("theoretical_speedup", "efficiency")]
        cells += [
            f"{row['peak_memory_mib']:.0f}" if "peak_memory_mib" in row else "",
            f"{row['first_call_s']:.1f}",
        ]
        table.add_row(name, *cells)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


if __name__ == "__main__":
    typer.run(main)
