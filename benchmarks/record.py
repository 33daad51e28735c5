"""What every benchmark shares: alternating timing, percentiles, machine facts, JSON with raw samples."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.progress import track
from rich.table import Table

from reroute_fx.benchmarking.machine import environment, peak_bytes
from reroute_fx.common.json_files import write_json

RESULTS = Path(__file__).parent / "results"
NumIters = Annotated[int, typer.Option(min=1, metavar="N", help="measured rounds")]
OutputJson = Annotated[
    Path,
    typer.Option(
        metavar="FILE",
        help="for what was measured; left out, a file in benchmarks/results",
        show_default=False,
    ),
]


def alternate(contenders: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round; every round runs all of them once, in turn."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in track(range(rounds), description="measuring"):
        for name, run in contenders.items():
            samples[name].append(call_seconds(run))
    return samples


def first_calls(contenders: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Seconds of the first call of each contender: compilation and warm-up."""
    seconds = {}
    for name, run in track(contenders.items(), description="compiling"):
        seconds[name] = call_seconds(run)
        run()
    return seconds


def call_seconds(run: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def summary(samples: list[float]) -> dict[str, float]:
    """Median and tail in milliseconds. With few samples p99 is close to the largest."""
    milliseconds = np.array(samples) * 1e3
    return {
        "p50_ms": float(np.percentile(milliseconds, 50)),
        "p99_ms": float(np.percentile(milliseconds, 99)),
        "min_ms": float(milliseconds.min()),
        "samples": len(samples),
    }


def ratio(baseline: list[float], other: list[float]) -> float:
    """How many times faster `other` is: the median over rounds of the ratio within a round."""
    return statistics.median(b / o for b, o in zip(baseline, other, strict=True))


def peak_memory(script: str, arguments: Sequence[str]) -> int:
    """Bytes that `script`, run in a fresh process, prints as its last word: those of `measure_memory`."""
    # A fixed threshold lets every tensor be mapped and unmapped on its own, so that the peak is the true one.
    variables = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def measure_memory(run: Callable[[], Any]) -> int:
    """Bytes by which one call raises the resident set at its peak, after a warm-up."""
    for _ in range(3):
        run()
    rise = peak_bytes(run, torch.device("cpu"))
    if rise is None:
        raise RuntimeError("the system doesn't tell the peak of the resident set; expected Linux")
    return rise


def write(name: str, record: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write a record into a folder, whole or not at all."""
    return save(folder / f"{name}.json", record)


def save(path: Path, record: Mapping[str, Any]) -> Path:
    """Write a record as JSON with the facts of the machine, whole or not at all."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"environment": environment(device), **record})
    return path


def number_table(first: str, *headings: str, title: str | None = None) -> Table:
    """A table of which all columns but the first hold numbers."""
    table = Table(first, title=title)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table
