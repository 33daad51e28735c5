"""What every benchmark shares: alternating timing, percentiles, machine facts, JSON with raw samples."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from reroute_fx.benchmarking.machine import environment

RESULTS = Path(__file__).parent / "results"


def alternate(
    contenders: Mapping[str, Callable[[], Any]], rounds: int, synchronize: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each contender in each round; every round runs all of them once, in turn."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in track(range(rounds), description="measuring"):
        for name, run in contenders.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            samples[name].append(time.perf_counter() - start)
    return samples


def first_calls(contenders: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Seconds of the first call of each contender: compilation and warm-up."""
    seconds = {}
    for name, run in track(contenders.items(), description="compiling"):
        seconds[name] = first_call_seconds(run)
        run()
    return seconds


def first_call_seconds(run: Callable[[], Any]) -> float:
    """Seconds of one call: compilation and warm-up."""
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
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def write(name: str, record: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write a record into a folder, whole or not at all."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"environment": environment(device), **record}, indent=1) + "\n")
    temporary.replace(path)
    return path
