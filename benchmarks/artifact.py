"""An artifact of a 32-layer model: how long it takes to write, how large it is, how it loads and how fast it runs.

    python benchmarks/artifact.py [--num-iters 20] [--width 1024] [--layers 32] [--output-json artifact_cpu.json]

The artifact is loaded in a fresh process that never sees the model: seconds of `reroute_fx.load`, of the first prompt
(first token) and of the second one, and how much memory the process then holds beyond what it held before, next to the
size of the weights. Prefill and decoding steps are timed in turn with the model that was compiled in the same process.
Seconds of the export are those of an empty compiler cache.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from models import build, build_qwen, llava_prompts, qwen_prompts
from record import (
    RESULTS,
    OutputJson,
    alternate,
    call_seconds,
    first_calls,
    number_table,
    ratio,
    save,
    summary,
)
from rich.console import Console
from safetensors.torch import save_file

import reroute_fx
from reroute_fx import Limits, RoutedCache

TEXT, STEPS = 40, 400
LIMITS = Limits(batch=8, length=2048, image_tokens=1024)
BUILD = {"llava": build, "qwen2.5-vl": build_qwen}


def make_prompt(family: str, model: Any) -> dict[str, torch.Tensor]:
    """576 visual tokens and 40 of text."""
    if family == "llava":
        return llava_prompts(model, batch=1, images=1, text=TEXT)
    return qwen_prompts(model, [(((24, 24),), TEXT)])


def prefill(model: Any, prompt: dict[str, torch.Tensor]) -> Callable[[], Any]:
    return torch.no_grad()(lambda: model(**prompt, logits_to_keep=1, use_cache=False))


def step(model: Any, prompt: dict[str, torch.Tensor]) -> Callable[[], Any]:
    """Decoding steps on a cache that has room for all of them."""
    cache = RoutedCache(max_length=prompt["input_ids"].shape[1] + STEPS)
    with torch.no_grad():
        model(**prompt, past_key_values=cache, logits_to_keep=1)
    token = torch.full((1, 1), 7)
    return torch.no_grad()(lambda: model(input_ids=token, past_key_values=cache))


def in_fresh_process(artifact: Path, prompt: Path) -> dict[str, float]:
    script = Path(__file__).with_name("fresh_artifact.py")
    command = [sys.executable, str(script), str(artifact), str(prompt)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    facts: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return facts


def measure(family: str, width: int, layers: int, rounds: int, folder: Path) -> dict[str, Any]:
    model = BUILD[family](width, layers)
    routed = reroute_fx.compile(model, tier=128)
    artifact, prompt = folder / family, make_prompt(family, model)
    export_seconds = call_seconds(lambda: reroute_fx.export(routed, artifact, limits=LIMITS))
    # Another tier has the same regions, which this process has compiled already.
    again = reroute_fx.compile(model, tier=192)
    again_seconds = call_seconds(
        lambda: reroute_fx.export(again, folder / "again", limits=LIMITS, overwrite=True)
    )
    save_file(prompt, folder / f"{family}.safetensors")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    size = sum(path.stat().st_size for path in artifact.rglob("*") if path.is_file())
    fresh = [in_fresh_process(artifact, folder / f"{family}.safetensors") for _ in range(3)]
    models = {"compiled": routed, "loaded": reroute_fx.load(artifact)}
    result: dict[str, Any] = {
        "export_s": export_seconds,
        "again_s": again_seconds,
        "weight_bytes": weights,
        "artifact_bytes": size,
        "size_over_weights": size / weights,
        "fresh_process": fresh,
    }
    for name, make in (("prefill", prefill), ("decode", step)):
        runs = {kind: make(made, prompt) for kind, made in models.items()}
        first_calls(runs)
        samples = alternate(runs, rounds if name == "prefill" else 3 * rounds)
        result[name] = {
            **{kind: summary(values) for kind, values in samples.items()},
            "loaded_over_compiled": ratio(samples["loaded"], samples["compiled"]),
            "seconds": samples,
        }
    return result


def main(
    num_iters: Annotated[
        int, typer.Option(min=1, metavar="N", help="measured rounds of prefill, and thrice as many steps")
    ] = 20,
    width: Annotated[int, typer.Option(help="hidden size")] = 1024,
    layers: Annotated[int, typer.Option(help="decoder layers")] = 32,
    output_json: OutputJson = RESULTS / "artifact_cpu.json",
) -> None:
    """Measure, and write what was measured."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="artifact_")
    with tempfile.TemporaryDirectory(prefix="artifact_") as folder:
        results = {family: measure(family, width, layers, num_iters, Path(folder)) for family in BUILD}
    setting = {
        "width": width,
        "layers": layers,
        "visual_tokens": 576,
        "text_tokens": TEXT,
        "dtype": "float32",
    }
    path = save(output_json, {"setting": setting, "models": results})
    console = Console(width=120)
    console.print(_table(results))
    console.print(f"written to {path}")


def _table(results: dict[str, Any]) -> Any:
    headings = ("export s", "size", "load s", "first prompt s", "memory", "prefill", "decode")
    table = number_table("", *headings, title="Artifacts; sizes and memory over weights, times over compiled")
    for family, result in results.items():
        fresh = sorted(result["fresh_process"], key=lambda facts: facts["load_s"])[1]
        table.add_row(
            family,
            f"{result['export_s']:.0f}",
            f"{result['size_over_weights']:.3f}",
            f"{fresh['load_s']:.1f}",
            f"{fresh['first_prompt_s']:.2f}",
            f"{fresh['held_bytes'] / result['weight_bytes']:.2f}",
            *(f"{result[name]['loaded_over_compiled']:.2f}" for name in ("prefill", "decode")),
        )
    return table


if __name__ == "__main__":
    typer.run(main)
