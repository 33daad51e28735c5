"""Section ``attention`` of the GPU benchmark: the kernels that programs name, next to PyTorch's own choice.

A prompt's attention is causal, that of a decoding step reads a cache under a mask, both at the sizes of 7B models.
``new lengths`` are calls of lengths that come for the first time, which is when a kernel may be planned.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_kernels import Shape, launch_seconds
from torch import fx

from reroute_fx.lowering.attention_kernels import pin_attention

NEW_LENGTHS = 12
CHOICES = ("pinned", "default")
aten = torch.ops.aten


@dataclass(frozen=True)
class Call:
    """An attention as a program has it.

    Attributes:
        name: what it is of.
        tensors: makes queries ``[B, H, Q, D]``, keys and values ``[B, Hkv, K, D]`` and a mask or None, of so many keys.
        length: of the keys.
    """

    name: str
    tensors: Callable[[int], tuple[torch.Tensor | None, ...]]
    length: int


def calls(shape: Shape, device: torch.device, dtype: torch.dtype) -> list[Call]:
    batch, heads, kv_heads, width = shape.batch, shape.heads, shape.kv_heads, shape.head_dim

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device).to(dtype)

    def prompt(length: int) -> tuple[torch.Tensor | None, ...]:
        keys, values = (normal(batch, kv_heads, length, width) for _ in range(2))
        return normal(batch, heads, length, width), keys, values, None

    def step(length: int) -> tuple[torch.Tensor | None, ...]:
        group = heads // kv_heads
        keys, values = (normal(batch, kv_heads, length, width) for _ in range(2))
        seen = torch.arange(length, device=device) < length - 3
        return (
            normal(batch, kv_heads, group, width),
            keys,
            values,
            seen.expand(batch, 1, group, length).contiguous(),
        )

    def grouped_step(length: int) -> tuple[torch.Tensor | None, ...]:
        query, keys, values, seen = step(length)
        assert query is not None
        assert seen is not None
        return query.reshape(batch, heads, 1, width), keys, values, seen[:, :, :1].contiguous()

    found = [
        Call("prompt", prompt, shape.length),
        Call("prompt, active tokens", prompt, shape.active),
        Call("step", step, shape.length + 64),
    ]
    return (
        found
        if heads == kv_heads
        else [*found, Call("step, groups not folded", grouped_step, shape.length + 64)]
    )


def measure_attention(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Microseconds of each call as programs name it (`pinned`) and as PyTorch chooses (`default`)."""
    rows = {}
    for call in calls(shape, device, dtype):
        sets = [call.tensors(call.length) for _ in range(3)]
        pinned, kernels = pin(sets[0], device)
        row: dict[str, Any] = {"kernel": kernels}
        for name, run in zip(CHOICES, (pinned, default), strict=True):
            launches = [partial(run, *given) for given in sets]
            row[name] = {
                "microseconds": 1e6 * launch_seconds(launches, device),
                "new_lengths_microseconds": [1e6 * s for s in _first_seconds(run, call, device)],
            }
        row["largest_difference"] = (pinned(*sets[0]) - default(*sets[0])).abs().max().item()
        rows[call.name] = row
    return rows


def default(query: Any, keys: Any, values: Any, mask: Any) -> torch.Tensor:
    grouped = query.shape[1] != keys.shape[1]
    return F.scaled_dot_product_attention(
        query, keys, values, mask, 0.0, mask is None, scale=query.shape[3] ** -0.5, enable_gqa=grouped
    )


def pin(tensors: Sequence[torch.Tensor | None], device: torch.device) -> tuple[Any, tuple[str, ...]]:
    """`default` as a graph whose kernels are named, and their names."""
    graph = fx.Graph()
    nodes = []
    for name, tensor in zip(("query", "keys", "values", "mask"), tensors, strict=True):
        nodes.append(graph.placeholder(name))
        nodes[-1].meta["val"] = tensor
    query, keys, _, mask = tensors
    assert query is not None
    assert keys is not None
    given = (*nodes[:3], None if mask is None else nodes[3], 0.0, mask is None)
    options = {"scale": query.shape[3] ** -0.5, "enable_gqa": query.shape[1] != keys.shape[1]}
    attended = graph.call_function(aten.scaled_dot_product_attention.default, given, options)
    attended.meta["val"] = query
    graph.output(attended)
    module = fx.GraphModule({}, graph)
    return module, pin_attention(module, device)


def _first_seconds(run: Callable[..., Any], call: Call, device: torch.device) -> list[float]:
    """Of calls with lengths that were not seen before, the wait for the device included."""
    seconds = []
    for extra in range(1, NEW_LENGTHS + 1):
        given = call.tensors(call.length + extra)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run(*given)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds
