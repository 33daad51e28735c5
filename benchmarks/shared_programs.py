"""Processor seconds of `compile` for models of one kind in one process: what the first leaves to the others.

python benchmarks/shared_programs.py [--output-json FILE]

Backend eager, so that only capturing and routing count; LLaVA with random weights, 32 layers. Each round runs in a
process of its own. What the process holds after each call is measured, too.
"""

import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
import typer
from models import build
from record import RESULTS, NumIters, OutputJson, number_table, save
from rich.console import Console
from rich.progress import track

import reroute_fx
from reroute_fx.benchmarking.machine import resident_bytes

WIDTH, LAYERS = 128, 32
CALLS = {"first": (0, 128), "another tier": (0, 64), "another model": (1, 128), "the same again": (1, 128)}
"""Which model a call is for, and its tier."""
ROUND = "round"


def one_round() -> dict[str, Any]:
    """Processor seconds of each call, and bytes that were there after it beyond those before the first."""
    torch.set_num_threads(1)
    models = [build(WIDTH, LAYERS) for _ in range(2)]
    before = resident_bytes()
    seconds, held = {}, {}
    for name, (number, tier) in CALLS.items():
        start = time.process_time()
        reroute_fx.compile(models[number], tier=tier, backend="eager")
        seconds[name] = time.process_time() - start
        held[name] = resident_bytes() - before
    return {"seconds": seconds, "bytes": held}


def main(num_iters: NumIters = 3, output_json: OutputJson = RESULTS / "shared_programs.json") -> None:
    """Measure in processes of their own, print medians and write all samples."""
    command = [sys.executable, __file__, ROUND]
    rounds = [
        json.loads(
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        )
        for _ in track(range(num_iters))
    ]
    table = number_table("call", "processor seconds", "MiB held since the start")
    for name in CALLS:
        seconds = statistics.median(each["seconds"][name] for each in rounds)
        held = statistics.median(each["bytes"][name] for each in rounds)
        table.add_row(name, f"{seconds:.2f}", f"{held / 2**20:.0f}")
    path = save(output_json, {"setting": {"width": WIDTH, "layers": LAYERS}, "rounds": rounds})
    Console().print(table, f"written to {path}")


if __name__ == "__main__":
    if sys.argv[1:] == [ROUND]:
        print(json.dumps(one_round()))
    else:
        typer.run(main)
