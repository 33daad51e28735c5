"""Seconds until a 32-layer decoder has answered for the first time: from an empty compiler cache, and from a full one.

    python benchmarks/compile_time.py [--repeats 3] [--layers 32] [--before CHECKOUT] [--output-json FILE]

Each sample is a process of its own that compiles a LLaVA and a Qwen2.5-VL for a tier, or without routing, and
generates two tokens: a prefill and a decoding step. The cold ones start with an empty cache directory, the warm ones
with the directory that a cold one left. ``torch.compile`` is the Hugging Face decoder, which is unrolled. How
wide the layers are makes no difference to the compiler; they are narrow here. An earlier version, in a checkout with a
.venv of its own, takes turns with this one.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from models import build, build_qwen, llava_prompts, qwen_prompts
from record import RESULTS, OutputJson, number_table, save
from rich.console import Console
from rich.progress import track
from rich.table import Table

import reroute_fx
from reroute_fx._compat import settle_cpu_math

VISUAL, TEXT = 576, 40
CONTENDERS = ("torch.compile", "compiled unrouted", "routed 128")
FAMILIES = ("llava", "qwen")


def model_and_inputs(family: str, width: int, layers: int) -> tuple[Any, dict[str, torch.Tensor]]:
    if family == "qwen":
        model = build_qwen(width, layers)
        return model, qwen_prompts(model, [([(24, 24)], TEXT)])
    model = build(width, layers)
    return model, llava_prompts(model, 1, 1, TEXT)


def first_answer(contender: str, family: str, width: int, layers: int) -> dict[str, float]:
    """Seconds of each phase up to the second token."""
    settle_cpu_math()
    torch._logging.set_logs(all=40)
    model, inputs = model_and_inputs(family, width, layers)
    start = time.perf_counter()
    if contender == "torch.compile":
        decoder = model.model.language_model
        decoder.forward = torch.compile(decoder.forward, dynamic=True)
        answering = model
    elif contender == "compiled unrouted":
        answering = reroute_fx.compile(model, method="none")
    else:
        answering = reroute_fx.compile(model, tier=128)
    phases = {"compile call": time.perf_counter() - start}
    answering.generate(**inputs, max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)
    phases["total"] = time.perf_counter() - start
    if contender != "torch.compile":
        phases |= {name: s for name, s in answering.report.seconds.items() if name != "total"}
    return phases


def sample(python: str, script: str, cache: str, *arguments: str) -> dict[str, float]:
    """Phases of one process with a cache directory."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    command = [python, script, "--sample", ",".join(arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    phases: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return phases


def main(
    repeats: Annotated[int, typer.Option(help="cold and warm processes; one of torch.compile")] = 3,
    width: Annotated[int, typer.Option(help="hidden size")] = 256,
    layers: Annotated[int, typer.Option(help="decoder layers")] = 32,
    before: Annotated[
        Path | None, typer.Option(help="checkout of an earlier version, with its .venv")
    ] = None,
    output_json: OutputJson = RESULTS / "compile_time_cpu.json",
    sample_of: Annotated[str, typer.Option("--sample", hidden=True)] = "",
) -> None:
    """Measure, and write what was measured."""
    if sample_of:
        contender, family, *sizes = sample_of.split(",")
        print(json.dumps(first_answer(contender, family, *map(int, sizes))))
        return
    samples: dict[str, dict[str, list[dict[str, float]]]] = {}
    kinds = [(contender, family) for family in FAMILIES for contender in CONTENDERS]
    versions = {"": (sys.executable, __file__)}
    if before:
        versions[", before"] = (str(before / ".venv/bin/python"), str(before / "benchmarks/compile_time.py"))
    for number in track(range(repeats), description="processes"):
        for (contender, family), version in itertools.product(kinds, versions):
            if contender == "torch.compile" and (number or version):
                continue  # minutes each
            with tempfile.TemporaryDirectory(prefix="compile_time_") as cache:
                found = samples.setdefault(f"{contender}, {family}{version}", {"cold": [], "warm": []})
                for state in found:
                    sizes = (str(width), str(layers))
                    found[state].append(sample(*versions[version], cache, contender, family, *sizes))
    rows = {name: {state: _medians(runs) for state, runs in found.items()} for name, found in samples.items()}
    setting = {"width": width, "layers": layers, "visual_tokens": VISUAL, "text_tokens": TEXT}
    path = save(
        output_json,
        {
            "setting": setting | {"before": before and _commit(before)},
            "median_seconds": rows,
            "seconds": samples,
        },
    )
    Console(width=120).print(_table(rows), f"written to {path}", sep="\n")


def _commit(checkout: Path) -> str:
    asked = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {phase: statistics.median(run[phase] for run in runs) for phase in runs[0]}


def _table(rows: dict[str, dict[str, dict[str, float]]]) -> Table:
    table = number_table("seconds until two tokens are there", "cold", "warm", "warm: in compile()")
    for name, row in rows.items():
        cells = (row["cold"]["total"], row["warm"]["total"], row["warm"]["compile call"])
        table.add_row(name, *(f"{seconds:.1f}" for seconds in cells))
    return table


if __name__ == "__main__":
    typer.run(main)
