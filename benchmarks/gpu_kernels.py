"""Sections ``rates`` and ``kernels`` of the GPU benchmark: what the device can do, and how near the kernels come."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from record import call_seconds

from reroute_fx import kernels

reroute = torch.ops.reroute


@dataclass(frozen=True)
class Rates:
    """What the device reaches on large work.

    Attributes:
        copy_bytes: bytes read and written per second by a device-to-device copy.
        matrix_flops: FLOPs per second of a large matrix product in the benchmark's dtype.
    """

    copy_bytes: float
    matrix_flops: float


def measure_rates(device: torch.device, dtype: torch.dtype, tiny: bool) -> Rates:
    size, width = (2**20, 256) if tiny else (2**30, 8192)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = median_seconds([lambda: target.copy_(source)], device)
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    product = median_seconds([lambda: a @ b], device)
    return Rates(2 * size / copy, 2 * width**3 / product)


def median_seconds(runs: Sequence[Callable[[], Any]], device: torch.device, repeats: int = 50) -> float:
    """Median time of a call; `runs` take turns, so that their inputs are not found in the cache."""
    for run in runs:
        run()
    if device.type != "cuda":
        return statistics.median(call_seconds(runs[i % len(runs)]) for i in range(repeats))
    pairs = []
    for i in range(repeats):
        pairs.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
        pairs[-1][0].record()
        runs[i % len(runs)]()
        pairs[-1][1].record()
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) / 1e3 for start, end in pairs)


def graphed(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The launches of a call without the host's share of the time; as it is on CPU."""
    if device.type != "cuda":
        return run
    run()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@dataclass(frozen=True)
class Shape:
    """Sizes of one model's prompt; `kept` is the share of the visual tokens."""

    name: str
    batch: int
    visual: int
    text: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    kept: float

    @property
    def length(self) -> int:
        return self.visual + self.text

    @property
    def active(self) -> int:
        return self.text + int(self.visual * self.kept)


def kernel_shapes(tiny: bool) -> list[Shape]:
    if tiny:
        return [Shape("tiny", 2, 40, 8, 64, 4, 2, 16, 0.25)]
    sizes = [(batch, visual) for visual in (576, 2304) for batch in (1, 8, 32)]
    llava = [Shape("llava-1.5-7b", b, v, 64, 4096, 32, 32, 128, 0.2655) for b, v in sizes]
    return llava + [Shape("qwen2.5-vl-7b", b, v, 64, 3584, 28, 4, 128, 0.2655) for b, v in sizes]


def measure_kernels(shape: Shape, device: torch.device, dtype: torch.dtype, rates: Rates) -> dict[str, Any]:
    """Time of each operator and of its eager composition, and its share of the measured copy bandwidth."""
    sets = [_inputs(shape, device, dtype, seed) for seed in range(3)]
    moved = _bytes(shape, dtype)
    rows = {}
    for name, arguments in sets[0].items():
        operator, reference = getattr(reroute, name), getattr(kernels, _reference(name))
        calls = [lambda given=s[name], run=operator: run(*given) for s in sets]
        plain = [lambda given=s[name], run=reference: run(*given) for s in sets]
        seconds = median_seconds([graphed(call, device) for call in calls], device)
        eager = median_seconds(plain, device)
        bandwidth = moved[name] / seconds
        rows[name] = {
            "microseconds": 1e6 * seconds,
            "launched_microseconds": 1e6 * median_seconds(calls, device),
            "eager_microseconds": 1e6 * eager,
            "bytes": moved[name],
            "share_of_copy_bandwidth": bandwidth / rates.copy_bytes,
        }
        del arguments
    return rows


def _reference(name: str) -> str:
    return "restore_tokens_reference_" if name.endswith("_") else f"{name}_reference"


def _inputs(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, tuple[Any, ...]]:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    batch, length = shape.batch, shape.length
    index = torch.arange(5, 5 + shape.visual, device=device).expand(batch, -1).contiguous()
    lengths = torch.full((batch,), length, device=device)
    count = shape.active - shape.text
    keep = (torch.arange(shape.visual, device=device) < count).expand(batch, -1).contiguous()
    keys = normal(batch, length, shape.kv_heads, shape.head_dim).transpose(1, 2)
    query = normal(batch, shape.heads, 1, shape.head_dim)
    scores = torch.rand(batch, shape.visual, generator=generator, device=device)
    positions, _ = reroute.select_tokens(scores, index, lengths, keep, None, length, shape.active)
    stream = normal(batch, length, shape.width)
    angles = [normal(1, length, shape.head_dim) for _ in range(2)]
    rows = normal(batch, shape.active, shape.width)
    return {
        "visual_scores": (query, keys, index, lengths, shape.head_dim**-0.5),
        "select_tokens": (scores, index, lengths, keep, None, length, shape.active),
        "compact_tokens": ([stream, *angles], positions, [1, 1, 1]),
        "restore_tokens_": (stream, rows, positions),
    }


def _bytes(shape: Shape, dtype: torch.dtype) -> dict[str, int]:
    """Least bytes that each operator reads and writes."""
    size, batch = dtype.itemsize, shape.batch
    moved = 2 * batch * shape.active * shape.width * size
    angles = 2 * 2 * batch * shape.active * shape.head_dim * size
    positions = 8 * batch * shape.active
    keys = batch * shape.kv_heads * shape.length * shape.head_dim * size
    return {
        "visual_scores": keys + 12 * batch * shape.visual,
        "select_tokens": positions + 14 * batch * shape.visual,
        "compact_tokens": moved + angles + positions,
        "restore_tokens_": moved + positions,
    }
