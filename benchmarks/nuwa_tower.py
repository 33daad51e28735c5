"""What the first stage of Nüwa adds to a compiled vision tower.

    python benchmarks/nuwa_tower.py [--num-iters 15] [--pictures 1] [--output-json nuwa_cpu.json]

The tower of LLaVA-1.5 (CLIP-L/14 at 336 pixels, 24 layers of width 1024, random weights) and its projector, compiled by
the same compiler: without the last layer, which LLaVA's features don't need; whole, as transformers runs it and as the
first stage needs it; and with the first stage at each tier, which also leaves the projector fewer patches. The rule of
the first stage runs on its own too, on random states: its share of the tower's time is free of the tower's noise. They
run in turn.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
import typer
from record import RESULTS, NumIters, OutputJson, alternate, first_calls, number_table, ratio, save, summary
from rich.console import Console
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from reroute_fx import RoutingConfig
from reroute_fx._compat import settle_cpu_math
from reroute_fx.capture.vision_tower import capture_vision_tower
from reroute_fx.lowering import lower
from reroute_fx.methods.nuwa import reduce
from reroute_fx.passes import CanonicalizeAttention, FindStates, TowerStates, run_passes, to_program
from reroute_fx.pipeline import reduce_tower

LAYERS = 24
TIERS = (192, 128, 64)
WHOLE, NEEDED = "whole tower", "without the last layer"


def build() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    # The decoder takes no part.
    text = LlamaConfig(
        hidden_size=4096, intermediate_size=64, num_hidden_layers=1, num_attention_heads=32, vocab_size=64
    )
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text)).eval()


def towers(model: LlavaForConditionalGeneration) -> dict[str, Any]:
    """Compiled programs from ``pixel_values`` to features."""
    tower = capture_vision_tower(model)
    needed, _ = run_passes(tower.program, [CanonicalizeAttention()])
    programs = {NEEDED: to_program(needed, tower.program, as_original=True), WHOLE: whole(tower.program)}
    for tier in TIERS:
        config = RoutingConfig.from_tier(tier, "nuwa")
        programs[f"first stage at {tier}"] = reduce_tower(tower, LAYERS, config).program
    return {name: lower(program, name=name) for name, program in programs.items()}


def rule(pictures: int, tier: int) -> Callable[[], Any]:
    """The first stage alone, compiled, on random states."""
    tokens, width, heads = 577, 1024, 16
    states = [torch.randn(pictures, tokens, width) for _ in range(LAYERS + 1)]
    keys = torch.randn(pictures, heads, tokens, width // heads)
    count = RoutingConfig.from_tier(tier, "nuwa").entering(tokens - 1)

    def run(keys: torch.Tensor, *states: torch.Tensor) -> Any:
        features = states[-2][:, 1:]
        return reduce(TowerStates(features, keys[:, :, :1], keys, (width // heads) ** -0.5, states, count))

    return partial(torch.compile(run), keys, *states)


def whole(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with what leaves its last layer among its outputs."""
    graph, _ = run_passes(program, [FindStates(LAYERS), CanonicalizeAttention()])
    graph.outputs["last"] = graph.states[-1]
    output = graph.fx_graph.output_node()
    output.args = ((*output.args[0], graph.states[-1]),)  # type: ignore[misc]
    return to_program(graph, program)


def main(
    num_iters: NumIters = 15,
    pictures: Annotated[int, typer.Option(help="pictures in a call")] = 1,
    output_json: OutputJson = RESULTS / "nuwa_cpu.json",
) -> None:
    """Measure, and write what was measured."""
    settle_cpu_math()
    made = towers(build())
    pixels = torch.randn(pictures, 3, 336, 336)
    runs: dict[str, Callable[[], Any]] = {
        name: partial(tower, pixel_values=pixels) for name, tower in made.items()
    }
    runs |= {f"its rule alone at {tier}": rule(pictures, tier) for tier in TIERS}
    first = first_calls(runs)
    samples = alternate(runs, num_iters)
    rows = {
        name: {
            **summary(taken),
            "over_whole": ratio(taken, samples[WHOLE]),
            "over_needed": ratio(taken, samples[NEEDED]),
            "first_call_seconds": first[name],
        }
        for name, taken in samples.items()
    }
    setting = {"pictures": pictures, "layers": LAYERS, "width": 1024, "patches": 576, "dtype": "float32"}
    path = save(output_json, {"setting": setting, "rows": rows, "seconds": samples})
    table = number_table("", "p50 ms", "p99 ms", "time / whole", "time / needed")
    for name, row in rows.items():
        cells = (f"{row['p50_ms']:.1f}", f"{row['p99_ms']:.1f}")
        table.add_row(name, *cells, f"{row['over_whole']:.3f}", f"{row['over_needed']:.3f}")
    console = Console(width=100)
    console.print(table)
    console.print(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
