"""Prefill of a 32-layer decoder: eager, compiled, and routed at each tier, alternating in one run.

    python benchmarks/prefill.py [--decoder gemma-3] [--num-iters 15] [--width 1024] [--weights bfloat16]

The decoder is a LLaVA's, a Qwen3-VL's with interleaved multimodal positions and features that are added behind its
first three layers, or a Gemma 3's of five layers with a window of 256 tokens to one without, on four pictures of which
the tokens see each other.

Baselines: the Hugging Face decoder in eager mode, the same decoder under `torch.compile`, and the captured
decoder through this project's compiler without routing. All fill a key-value cache. The routing efficiency is
the measured speed-up over the *faster* compiled baseline divided by the theoretical FLOP ratio, scoring
counted. The floor of a tier is its matrix products and its attention alone, at the rows that its layers have.
Each graph-level saving is switched at tier 128. Weights are float32, bfloat16, or int8 with a scale for each output
(torchao's weight-only) where all else is bfloat16. Peak memory is read from the kernel, each contender in a process of
its own.
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from decoders import Floor, Prefill, Prompts
from models import build, build_gemma, build_qwen3
from record import (
    RESULTS,
    NumIters,
    alternate,
    first_calls,
    measure_memory,
    number_table,
    peak_memory,
    ratio,
    save,
    summary,
)
from rich.console import Console
from rich.table import Table
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import PreTrainedModel

from reroute_fx import RoutingConfig, Savings
from reroute_fx._compat import settle_cpu_math
from reroute_fx.capture import capture_decoder

TEXT = 40
TIERS = (192, 128, 64)
COMPILED = ("torch.compile", "compiled unrouted")
SWITCHED = 128
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}
"""Of the activations, for each kind of weights."""
SAVINGS = {
    "not in place": Savings(restore_in_place=False),
}


@dataclass(frozen=True)
class Decoder:
    """How a model is built, by width and layers, and the visual tokens of the pictures of a prompt."""

    build: Callable[[int, int], PreTrainedModel]
    pictures: tuple[int, ...]


DECODERS = {
    "llava": Decoder(build, (576,)),
    "qwen3-vl": Decoder(build_qwen3, (576,)),
    "gemma-3": Decoder(build_gemma, (144,) * 4),
}


def with_weights(model: PreTrainedModel, weights: str) -> PreTrainedModel:
    """The model with another kind of weights; changed in place."""
    model = model.to(DTYPES[weights])
    if weights == "int8":
        quantize_(model.model.language_model, Int8WeightOnlyConfig())
    return model


def contenders(
    model: PreTrainedModel, pictures: tuple[int, ...]
) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """What is measured, and the report of each routed contender."""
    decoder, captured = model.model.language_model, capture_decoder(model)
    prompts = Prompts.of(model, captured, 1, pictures, TEXT)

    def hugging_face(run: Callable[..., Any]) -> Callable[[], Any]:
        given = {"inputs_embeds": prompts.embeds, "position_ids": prompts.positions, **prompts.of_decoder}
        return torch.no_grad()(lambda: run(**given, use_cache=True))

    prefills = {"compiled unrouted": Prefill(captured, None)}
    floors = {}
    for tier in TIERS:
        config = RoutingConfig.from_tier(tier, num_layers=captured.num_layers)
        prefills[f"routed {tier}"] = Prefill(captured, config)
        floors[f"floor {tier}"] = Floor(decoder, config, prompts)
    config = RoutingConfig.from_tier(SWITCHED, num_layers=captured.num_layers)
    for name, savings in SAVINGS.items():
        prefills[f"routed {SWITCHED}, {name}"] = Prefill(captured, config, savings)
    runs = {"eager": hugging_face(decoder), "torch.compile": hugging_face(torch.compile(decoder))}
    runs |= {name: partial(prefill, prompts) for name, prefill in prefills.items()}
    reports = {
        name: prefill.report.at(visual_tokens=prompts.visual, text_tokens=TEXT)
        for name, prefill in prefills.items()
        if prefill.config
    }
    return runs | floors, reports


def main(
    num_iters: NumIters = 15,
    decoder: Annotated[str, typer.Option(help=", ".join(DECODERS))] = "llava",
    width: Annotated[int, typer.Option(help="hidden size")] = 1024,
    layers: Annotated[int, typer.Option(help="decoder layers")] = 32,
    weights: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "float32",
    output_json: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="for what was measured",
            show_default="benchmarks/results/prefill_cpu.json, or prefill_gemma-3_cpu_bfloat16.json, say",
        ),
    ] = None,
    memory: Annotated[bool, typer.Option(help="measure peak memory too")] = True,
    memory_of: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure, and write what was measured."""
    for option, chosen, known in (("weights", weights, DTYPES), ("decoder", decoder, DECODERS)):
        if chosen not in known:
            raise typer.BadParameter(f"--{option} is {chosen!r}; expected one of {list(known)}")
    if output_json is None:
        output_json = RESULTS / _file_name(decoder, weights)
    if not memory_of:
        # An empty cache, so that first calls are cold; the processes that measure memory inherit it.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="prefill_")
    settle_cpu_math()
    torch._logging.set_logs(all=40)
    measured = DECODERS[decoder]
    runs, reports = contenders(with_weights(measured.build(width, layers), weights), measured.pictures)
    if memory_of:
        print(measure_memory(runs[memory_of]))
        return
    first = first_calls(runs)
    samples = alternate(runs, num_iters)
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
        floor = name.replace("routed", "floor")
        if floor != name and floor in samples:
            row["above_floor"] = ratio(samples[name], samples[floor])
        if memory and not name.startswith("floor") and "," not in name:
            arguments = ["--width", str(width), "--layers", str(layers), "--weights", weights]
            arguments += ["--decoder", decoder, "--memory-of", name]
            row["peak_memory_mib"] = peak_memory(__file__, arguments) / 2**20
        rows[name] = row
    setting = {
        "decoder": decoder,
        "width": width,
        "layers": layers,
        "pictures": measured.pictures,
        "visual_tokens": sum(measured.pictures),
        "text_tokens": TEXT,
        "weights": weights,
        "dtype": str(DTYPES[weights]).removeprefix("torch."),
    }
    record = {"setting": setting, "compiled_baseline": baseline, "rows": rows, "seconds": samples}
    path = save(output_json, record)
    Console(width=120).print(_table(rows), f"compiled baseline: {baseline}", f"written to {path}", sep="\n")


def _file_name(decoder: str, weights: str) -> str:
    parts = ["prefill", *([decoder] if decoder != "llava" else []), "cpu"]
    return "_".join([*parts, *([weights] if weights != "float32" else [])]) + ".json"


def _table(rows: dict[str, dict[str, Any]]) -> Table:
    table = number_table(
        "",
        "p50 ms",
        "p99 ms",
        "x eager",
        "x compiled",
        "theory",
        "efficiency",
        "x floor",
        "peak MiB",
        "first call s",
    )
    for name, row in rows.items():
        cells = [f"{row['p50_ms']:.0f}", f"{row['p99_ms']:.0f}", f"{row['speedup_over_eager']:.2f}"]
        cells.append(f"{row['speedup_over_compiled']:.2f}")
        cells += [
            f"{row[k]:.2f}" if k in row else "" for k in ("theoretical_speedup", "efficiency", "above_floor")
        ]
        cells += [
            f"{row['peak_memory_mib']:.0f}" if "peak_memory_mib" in row else "",
            f"{row['first_call_s']:.1f}",
        ]
        table.add_row(name, *cells)
    return table


if __name__ == "__main__":
    typer.run(main)
