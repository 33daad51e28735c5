"""Sections ``rates`` and ``kernels`` of the GPU benchmark: what the device can do, and how near the kernels come.

A kernel takes microseconds, less than it takes to launch it. So many launches are recorded as one CUDA graph, each with
inputs and results of its own, the caches of the device are emptied before it runs, and its time is divided by their
number. The kernels are launched as an operator does it, and as Inductor does it, which knows which sizes divide by 16.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from record import call_seconds
from torch import fx
from torch.export import Dim

from reroute_fx import kernels
from reroute_fx.lowering.inductor.compiled_regions import _CompiledRegion

reroute = torch.ops.reroute
LAUNCHES = 20
"""Launches that are recorded as one graph."""
OPERATORS = ("visual_scores", "select_tokens", "compact_tokens", "restore_tokens_")
COMPILED = OPERATORS[:-1]
"""What Inductor compiles, as part of a decision. Restoring is a region of its own, and launched as an operator."""


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
    copy = median_seconds(lambda: target.copy_(source), device)
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    product = median_seconds(lambda: a @ b, device)
    return Rates(2 * size / copy, 2 * width**3 / product)


def median_seconds(run: Callable[[], Any], device: torch.device, repeats: int = 50) -> float:
    """Median time of a call that finds nothing in the cache; of `repeats` on CPU, where the cache is not emptied."""
    if device.type != "cuda":
        run()
        return statistics.median(call_seconds(run) for _ in range(repeats))
    from triton.testing import do_bench

    milliseconds: float = do_bench(run, rep=50, return_mode="median")
    return milliseconds / 1e3


def launch_seconds(runs: Sequence[Callable[[], Any]], device: torch.device) -> float:
    """Time of one of many launches in a row, without the host's share; `runs` take turns."""
    together = graphed([runs[i % len(runs)] for i in range(LAUNCHES)], device)
    return median_seconds(together, device) / LAUNCHES


def graphed(runs: Sequence[Callable[[], Any]], device: torch.device) -> Callable[[], Any]:
    """One call for all `runs`: on a GPU a graph of what they launch, whose results lie apart from each other."""

    def run_all() -> list[Any]:
        return [run() for run in runs]

    if device.type != "cuda":
        return run_all
    run_all()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_all()
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
    """Time of each operator and of its eager composition, and its share of the measured copy bandwidth.

    Returns:
        For each operator ``microseconds`` of one launch of many, ``inductor_microseconds`` as Inductor launches it,
        ``launched_microseconds`` of a call from the host, ``eager_microseconds`` of its reference, called likewise, the
        least ``bytes`` that it moves, and its ``share_of_copy_bandwidth``.
    """
    rows = {}
    for name in OPERATORS:
        operator, reference = getattr(reroute, name), getattr(kernels, _reference(name))
        sets = _sets(name, shape, device, dtype)
        moved = _bytes(shape, dtype)[name]
        seconds = launch_seconds([partial(operator, *given) for given in sets], device)
        row = {"microseconds": 1e6 * seconds}
        if name in COMPILED:
            # Widths and heads are those of the model; batch 1 is no example of any batch.
            region = _compiled(name, replace(shape, batch=3, visual=40, text=8), device, dtype)
            calls = [partial(region, *_tensors(name, given)) for given in sets]
            row["inductor_microseconds"] = 1e6 * launch_seconds(calls, device)
        row["launched_microseconds"] = 1e6 * median_seconds(partial(operator, *sets[0]), device)
        row["eager_microseconds"] = 1e6 * median_seconds(partial(reference, *sets[0]), device)
        rows[name] = row | {"bytes": moved, "share_of_copy_bandwidth": moved / seconds / rates.copy_bytes}
    return rows


def _sets(name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Arguments of as many calls as it takes for the cache to hold none of them when its turn comes again."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    needed = -(-3 * cache // _bytes(shape, dtype)[name])
    count = max(3, min(LAUNCHES, needed))
    return [_arguments(name, shape, device, dtype, seed) for seed in range(count)]


@lru_cache
def _compiled(name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> _CompiledRegion:
    """An operator as a region that Inductor compiles for any rows and lengths, with `shape` as example."""
    tensors = _tensors(name, _arguments(name, shape, device, dtype, seed=0))
    sizes = tuple(dict.fromkeys(dims, Dim.AUTO) for dims in _ROWS[name])
    call = _DecisionCall(name, shape.head_dim**-0.5)
    program = torch.export.export(call, tensors, dynamic_shapes=(sizes,))
    return _CompiledRegion(fx.GraphModule({}, program.graph), device, dynamic=True)


_ROWS = {
    "visual_scores": ([0], [0, 2], [0, 1], [0]),
    "select_tokens": ([0, 1], [0, 1], [0], [0, 1], [0, 1], [0, 1]),
    "compact_tokens": ([0, 1], [1], [1], [0, 1]),
}
"""Of each tensor that `_DecisionCall` takes the dimensions of rows and tokens."""


class _DecisionCall(torch.nn.Module):
    """One operator as a routed program calls it, of tensors only."""

    def __init__(self, name: str, scale: float) -> None:
        super().__init__()
        self.name, self.scale = name, scale

    def forward(self, *tensors: torch.Tensor) -> Any:
        if self.name == "visual_scores":
            return reroute.visual_scores(*tensors, self.scale)
        if self.name == "select_tokens":
            *tensors, stream, stage = tensors
            return reroute.select_tokens(*tensors, None, stream.shape[1], stage.shape[1])
        *streams, positions = tensors
        return reroute.compact_tokens(streams, positions, [1] * len(streams))


def _tensors(name: str, arguments: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    """Arguments of an operator as `_DecisionCall` takes them: lengths are those of tensors."""
    if name == "visual_scores":
        return arguments[:4]
    if name == "compact_tokens":
        return (*arguments[0], arguments[1])
    scores, index, lengths, keep, _, length, slots = arguments
    return scores, index, lengths, keep, *(keep.new_empty(len(keep), size) for size in (length, slots))


def _reference(name: str) -> str:
    return "restore_tokens_reference_" if name.endswith("_") else f"{name}_reference"


def _arguments(
    name: str, shape: Shape, device: torch.device, dtype: torch.dtype, seed: int
) -> tuple[Any, ...]:
    """Arguments of an operator: random numbers, the visual tokens in one piece."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    batch, length = shape.batch, shape.length
    index = torch.arange(5, 5 + shape.visual, device=device).expand(batch, -1).contiguous()
    lengths = torch.full((batch,), length, device=device)
    if name == "visual_scores":
        keys = normal(batch, length, shape.kv_heads, shape.head_dim).transpose(1, 2)
        query = normal(batch, shape.heads, 1, shape.head_dim)
        return query, keys, index, lengths, shape.head_dim**-0.5
    count = shape.active - shape.text
    keep = (torch.arange(shape.visual, device=device) < count).expand(batch, -1).contiguous()
    scores = torch.rand(batch, shape.visual, generator=generator, device=device)
    selecting = scores, index, lengths, keep, None, length, shape.active
    if name == "select_tokens":
        return selecting
    positions, _ = reroute.select_tokens(*selecting)
    stream = normal(batch, length, shape.width)
    if name == "compact_tokens":
        angles = [normal(1, length, shape.head_dim) for _ in range(2)]
        return [stream, *angles], positions, [1, 1, 1]
    return stream, normal(batch, shape.active, shape.width), positions


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
