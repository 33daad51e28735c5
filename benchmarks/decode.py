"""One decoding step of a 32-layer decoder: eager, compiled, and on the caches that routing leaves.

    python benchmarks/decode.py [--num-iters 60] [--width 1024] [--batch-size 1,8] [--output-json decode_cpu.json]

Each step adds one token to a cache filled by a prompt of 576 visual and 40 text tokens. ``torch.compile`` is the
Hugging Face decoder on a `StaticCache` of the same capacity. ``stages, full cache`` is this project's program
with a cache length for each stage, all of them full: what it costs at an equal cache length. Bytes of keys and
values are those of the tensors held, next to what the report promises.
"""

import os
import tempfile
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from models import build
from record import RESULTS, NumIters, OutputJson, alternate, first_calls, number_table, ratio, save, summary
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, LlavaForConditionalGeneration, StaticCache

from reroute_fx import RoutedCache, RoutingConfig
from reroute_fx._compat import settle_cpu_math
from reroute_fx.capture import capture_decoder
from reroute_fx.lowering import lower
from reroute_fx.pipeline import continuation, route
from reroute_fx.runtime.cache import CachedRows

VISUAL, TEXT = 576, 40
LENGTH, ROOM = VISUAL + TEXT, 256
TIERS = (192, 128, 64)
STAGES = "stages, full cache"


class Step:
    """A decoding step of this project's program on a cache of given lengths."""

    def __init__(
        self, model: LlavaForConditionalGeneration, config: RoutingConfig, batch: int, full: bool
    ) -> None:
        text = model.config.text_config
        captured = capture_decoder(model)
        program = continuation(captured.program, config.decision_layers, captured.num_layers)
        self.executable = lower(program, name="continuation")
        tokens = (
            (VISUAL,) * captured.num_layers if full else config.tokens_per_layer(captured.num_layers, VISUAL)
        )
        lengths = [t + TEXT for t in tokens]
        stages = {start: lengths[start] for start in (0, *config.decision_layers)}
        rows = CachedRows(
            config,
            owner="",
            columns=LENGTH,
            filled=stages,
            tokens={start: torch.full((batch,), length) for start, length in stages.items()},
            next_position=torch.full((batch,), LENGTH),
            gone=torch.zeros(batch, dtype=torch.long),
        )
        size = text.num_key_value_heads, text.hidden_size // text.num_attention_heads
        keys, values = ([torch.randn(batch, size[0], n, size[1]) for n in lengths] for _ in range(2))
        self.cache = RoutedCache(max_length=LENGTH + ROOM)
        self.cache.fill(rows, keys, values)
        self.embeds = torch.randn(batch, 1, text.hidden_size)
        self.one = torch.ones(batch, dtype=torch.long)

    def __call__(self) -> None:
        self.cache.reserve(1)
        rows = self.cache.rows
        assert rows is not None
        positions = rows.next_position[:, None]
        self.executable(inputs_embeds=self.embeds, position_ids=positions, **self.cache.inputs())
        self.cache.advance(1, self.one)


def hugging_face(model: LlavaForConditionalGeneration, batch: int, compiled: bool) -> Callable[[], Any]:
    decoder = model.model.language_model
    cache = (
        StaticCache(config=decoder.config, max_cache_len=LENGTH + ROOM)
        if compiled
        else DynamicCache(config=decoder.config)
    )
    prompt, token = (
        torch.randn(batch, LENGTH, decoder.config.hidden_size),
        torch.randn(batch, 1, decoder.config.hidden_size),
    )
    with torch.no_grad():
        decoder(inputs_embeds=prompt, past_key_values=cache)
    run = torch.compile(decoder) if compiled else decoder
    position = torch.full((batch, 1), LENGTH)

    @torch.no_grad()
    def step() -> None:
        run(inputs_embeds=token, position_ids=position, past_key_values=cache)
        position.add_(1)

    return step


def measure(model: LlavaForConditionalGeneration, batch: int, rounds: int) -> dict[str, Any]:
    captured = capture_decoder(model)
    configs = {tier: RoutingConfig.from_tier(tier, num_layers=captured.num_layers) for tier in TIERS}
    runs: dict[str, Any] = {
        "eager": hugging_face(model, batch, compiled=False),
        "torch.compile": hugging_face(model, batch, compiled=True),
        STAGES: Step(model, configs[128], batch, full=True),
    }
    runs |= {f"routed {tier}": Step(model, config, batch, full=False) for tier, config in configs.items()}
    first = first_calls(runs)
    samples = alternate(runs, rounds)
    rows = {}
    for name, run in runs.items():
        row: dict[str, Any] = {"first_call_s": first[name], **summary(samples[name])}
        row["speedup_over_compiled"] = ratio(samples["torch.compile"], samples[name])
        row["time_over_compiled"] = 1 / row["speedup_over_compiled"]
        if isinstance(run, Step):
            row["compilations"] = run.executable.compilations
            row["kv_bytes"] = run.cache.kv_bytes
        if name.startswith("routed"):
            _, report = route(captured.program, configs[int(name.split()[1])])
            report = report.at(visual_tokens=VISUAL, text_tokens=TEXT + ROOM)
            row["kv_bytes_theory"] = batch * report.routed.kv_bytes
        rows[name] = row
    return {"rows": rows, "seconds": samples}


def main(
    num_iters: NumIters = 60,
    width: Annotated[int, typer.Option(help="hidden size")] = 1024,
    layers: Annotated[int, typer.Option(help="decoder layers")] = 32,
    batch_size: Annotated[
        str, typer.Option(metavar="N,...", help="rows of a step, one after the other")
    ] = "1,8",
    output_json: OutputJson = RESULTS / "decode_cpu.json",
) -> None:
    """Measure, and write what was measured."""
    # An empty cache, so that first calls are cold; larger batches find parts of what smaller ones compiled.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="decode_")
    settle_cpu_math()
    model = build(width, layers)
    results = {size: measure(model, size, num_iters) for size in map(int, batch_size.split(","))}
    setting = {
        "width": width,
        "layers": layers,
        "visual_tokens": VISUAL,
        "text_tokens": TEXT,
        "room": ROOM,
        "dtype": "float32",
    }
    path = save(output_json, {"setting": setting, "batch": results})
    console = Console(width=120)
    for size, result in results.items():
        console.print(_table(size, result["rows"]))
    console.print(f"written to {path}")


def _table(batch: int, rows: dict[str, dict[str, Any]]) -> Table:
    table = number_table(
        "", "p50 ms", "p99 ms", "time / compiled", "KV MiB", "theory", "first call s", title=f"batch {batch}"
    )
    for name, row in rows.items():
        cells = [f"{row['p50_ms']:.1f}", f"{row['p99_ms']:.1f}", f"{row['time_over_compiled']:.2f}"]
        cells += [f"{row[key] / 2**20:.2f}" if key in row else "" for key in ("kv_bytes", "kv_bytes_theory")]
        table.add_row(name, *cells, f"{row['first_call_s']:.1f}")
    return table


if __name__ == "__main__":
    typer.run(main)
