"""Prefill of eight prompts of mixed sizes in batches of 1, 2, 4 and 8: eager, compiled, and routed.

    python benchmarks/batch.py [--num-iters 5] [--width 768] [--layers 16] [--output-json batch_cpu.json]

Every contender processes the same eight prompts, each with its own images and text, in the order given and
without sorting by size, so that batches are padded. Throughput is prompts per second. On a machine that is
bound by its arithmetic a batch takes the time of its rows, so that throughput should not fall with the batch
size; what padding adds is reported as the share of computed layer rows that hold no token. ``torch.compile`` is
the Hugging Face decoder with dynamic sizes and its padding mask, ``compiled unrouted`` the captured decoder
through this project's compiler, with tokens moved to the front and no mask.

Then one routed model answers 30 prompts of 30 sizes after a warm-up: how often it compiles again is recorded.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from models import build_qwen, qwen_prompts
from record import (
    RESULTS,
    NumIters,
    OutputJson,
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
from rich.progress import track
from rich.table import Table
from transformers import Qwen2_5_VLForConditionalGeneration

import reroute_fx
from reroute_fx import RoutingConfig
from reroute_fx._compat import settle_cpu_math
from reroute_fx.analysis.routing_report import RoutingReport
from reroute_fx.capture import capture_decoder
from reroute_fx.lowering import Executable, lower
from reroute_fx.pipeline import route, unrouted
from reroute_fx.runtime.rows import Places
from reroute_fx.selection.row_plan import RowPlan, plan_rows

TIER = 128
BATCHES = (1, 2, 4, 8)
COMPILED = ("torch.compile", "compiled unrouted")
PROMPTS = (
    ([(24, 24)], 40),
    ([(16, 20)], 90),
    ([(28, 26)], 24),
    ([(18, 18), (14, 12)], 64),
    ([(24, 16)], 120),
    ([(20, 30)], 32),
    ([(12, 16), (12, 16), (10, 10)], 48),
    ([(24, 24)], 56),
)
"""Images as height and width in visual tokens, and text tokens."""


@dataclass
class Batch:
    """Decoder inputs of one batch, padded on the left as processors do."""

    embeds: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    is_visual: torch.Tensor
    images: list[list[int]]

    @classmethod
    def of(cls, model: Qwen2_5_VLForConditionalGeneration, prompts: Sequence[Any]) -> "Batch":
        inputs = qwen_prompts(model, prompts)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        names = ("mm_token_type_ids", "image_grid_thw", "attention_mask")
        positions, _ = model.model.get_rope_index(ids, **{name: inputs[name] for name in names})
        embeds = torch.randn(*ids.shape, model.config.text_config.hidden_size)
        images = [[h * w for h, w in row] for row, _ in prompts]
        return cls(embeds, mask, positions, ids == model.config.image_token_id, images)

    def to_front(self) -> dict[str, torch.Tensor]:
        places = Places.of(self.mask != 0)
        return {
            "inputs_embeds": places.to_front(self.embeds),
            "position_ids": places.to_front(self.positions, 2),
        }

    def plan(self, config: RoutingConfig) -> RowPlan:
        is_visual = Places.of(self.mask != 0).to_front(self.is_visual)
        return plan_rows(config, is_visual, self.mask.sum(dim=1).tolist(), self.images)


def contenders(
    model: Qwen2_5_VLForConditionalGeneration,
) -> tuple[dict[str, Callable[[Batch], Any]], RoutingReport]:
    """What is measured, and the report of the routed contender."""
    decoder, captured = model.model.language_model, capture_decoder(model)
    config = RoutingConfig.from_tier(TIER, num_layers=captured.num_layers)
    program, report = route(captured.program, config, num_layers=captured.num_layers)
    compiled = torch.compile(decoder, dynamic=True)

    def hugging_face(run: Callable[..., Any]) -> Callable[[Batch], Any]:
        def prefill(batch: Batch) -> Any:
            with torch.no_grad():
                return run(
                    inputs_embeds=batch.embeds,
                    attention_mask=batch.mask,
                    position_ids=batch.positions,
                    use_cache=True,
                )

        return prefill

    def ours(executable: Executable, config: RoutingConfig | None) -> Callable[[Batch], Any]:
        def prefill(batch: Batch) -> Any:
            inputs = batch.plan(config).inputs if config else {}
            return executable(**batch.to_front(), **inputs)

        return prefill

    prefills = {
        "eager": hugging_face(decoder),
        "torch.compile": hugging_face(compiled),
        "compiled unrouted": ours(lower(unrouted(captured.program, captured.num_layers)), None),
        f"routed {TIER}": ours(lower(program), config),
    }
    return prefills, report


def padding_waste(report: RoutingReport, batches: Sequence[Batch], routed: bool) -> float:
    """Share of the FLOPs of all layers that is spent on padding."""
    needed = computed = 0
    for batch in batches:
        plan = batch.plan(report.config)
        count = len(report.layers)
        lengths = plan.layer_lengths(count) if routed else [plan.lengths] * count
        for current, layer in zip(lengths, report.layers, strict=True):
            needed += sum(map(layer.flops, current))
            computed += len(current) * layer.flops(max(current))
    return 1 - needed / computed


def groups(model: Qwen2_5_VLForConditionalGeneration, size: int) -> list[Batch]:
    return [Batch.of(model, PROMPTS[i : i + size]) for i in range(0, len(PROMPTS), size)]


def throughput(
    model: Qwen2_5_VLForConditionalGeneration, rounds: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rows of the table and raw seconds, by contender and batch size."""
    prefills, report = contenders(model)
    batches = {size: groups(model, size) for size in BATCHES}
    runs = {
        f"{name}, batch {size}": lambda prefill=prefill, size=size: [
            prefill(batch) for batch in batches[size]
        ]
        for name, prefill in prefills.items()
        for size in BATCHES
    }
    first = first_calls(runs)
    samples = alternate(runs, rounds)
    rows = {}
    for name in prefills:
        for size in BATCHES:
            key = f"{name}, batch {size}"
            baseline = min(
                (f"{other}, batch {size}" for other in COMPILED), key=lambda k: summary(samples[k])["p50_ms"]
            )
            row: dict[str, Any] = {"first_call_s": first[key], **summary(samples[key])}
            row["prompts_per_s"] = len(PROMPTS) / row["p50_ms"] * 1e3
            row["throughput_over_batch_1"] = ratio(samples[f"{name}, batch 1"], samples[key])
            row["speedup_over_compiled"] = ratio(samples[baseline], samples[key])
            row["padding_waste"] = padding_waste(report, batches[size], name.startswith("routed"))
            rows[key] = row
    return rows, samples


def recompilations(prompts: int = 30) -> dict[str, Any]:
    """How often a routed model compiles while it answers prompts of different sizes, one by one."""
    model = build_qwen(256, 8)
    routed = reroute_fx.compile(model, tier=TIER)

    def answer(height: int, width: int, text: int) -> None:
        inputs = qwen_prompts(model, [([(height, width)], text)])
        routed.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)

    answer(16, 16, 40)
    warm = dict(routed.report.compilations)
    for i in track(range(prompts), description="30 sizes"):
        answer(8 + i, 9 + (7 * i) % 20, 12 + 3 * i)
    return {"prompts": prompts, "after_warm_up": warm, "at_the_end": dict(routed.report.compilations)}


def main(
    num_iters: NumIters = 5,
    width: Annotated[int, typer.Option(help="hidden size")] = 768,
    layers: Annotated[int, typer.Option(help="decoder layers")] = 16,
    output_json: OutputJson = RESULTS / "batch_cpu.json",
    memory_of: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure, and write what was measured."""
    if not memory_of:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="batch_")
    settle_cpu_math()
    torch._logging.set_logs(all=40)
    model = build_qwen(width, layers)
    if memory_of:
        name, _, size = memory_of.partition(", batch ")
        prefills, _ = contenders(model)
        prefill, (batch, *_) = prefills[name], groups(model, int(size))
        print(measure_memory(lambda: prefill(batch)))
        return
    counts = recompilations()
    rows, samples = throughput(model, num_iters)
    largest = [name for name in rows if name.endswith(f"batch {BATCHES[-1]}")]
    for name in track(largest, description="memory"):
        arguments = ["--width", str(width), "--layers", str(layers), "--memory-of", name]
        rows[name]["peak_memory_mib"] = peak_memory(__file__, arguments) / 2**20
    setting = {"width": width, "layers": layers, "tier": TIER, "prompts": PROMPTS, "dtype": "float32"}
    path = save(output_json, {"setting": setting, "recompilations": counts, "rows": rows, "seconds": samples})
    Console(width=120).print(_table(rows), f"compilations: {counts}", f"written to {path}", sep="\n")


def _table(rows: dict[str, dict[str, Any]]) -> Table:
    table = number_table("", "prompts/s", "x batch 1", "x compiled", "padding", "peak MiB", "first call s")
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['prompts_per_s']:.2f}",
            f"{row['throughput_over_batch_1']:.2f}",
            f"{row['speedup_over_compiled']:.2f}",
            f"{100 * row['padding_waste']:.0f} %",
            f"{row['peak_memory_mib']:.0f}" if "peak_memory_mib" in row else "",
            f"{row['first_call_s']:.1f}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
