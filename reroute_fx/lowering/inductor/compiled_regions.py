"""The `inductor` backend: each distinct region through `torch.compile`, lengths dynamic."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch._dynamo import lookup_backend

from ..implementations import use_implementations
from ..regions import Regions, device_key, share_regions

_regions: dict[str, Callable[..., Any]] = {}
"""Those of this process that take any sizes: other tiers of a model, and other models, have layers in common."""


@dataclass
class Compilations:
    """What was compiled so far in the calls of one program.

    Attributes:
        regions: how often a region was compiled.
        seconds: spent on it, without tracing.
        on_region: called after each.
    """

    regions: int = 0
    seconds: float = 0.0
    on_region: Callable[[], None] | None = None

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what is compiled inside; one thread at a time."""
        global _counting
        before, _counting = _counting, self
        try:
            yield
        finally:
            _counting = before


_counting = Compilations()
"""Of the program that runs. Regions don't know which one calls them."""


def lower(module: fx.GraphModule, device: torch.device, dynamic: bool) -> Regions:
    """Graph module whose regions are compiled for `device` at their first call, by whichever program."""

    def compile_region(region: fx.GraphModule) -> Callable[..., Any]:
        if not dynamic:
            return _compile(region, device, dynamic=False)
        key = device_key(region, device)
        if key not in _regions:
            _regions[key] = _compile(region, device, dynamic=True)
        return _regions[key]

    return share_regions(module, compile_region, lambda region: use_implementations(region, device).forward)


def _compile(region: fx.GraphModule, device: torch.device, dynamic: bool) -> Callable[..., Any]:
    forward = use_implementations(region, device).forward
    return torch.compile(forward, backend=_compile_graph, dynamic=dynamic, fullgraph=True)


def _compile_graph(graph: fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
    start = time.perf_counter()
    compiled = cast(Callable[..., Any], lookup_backend("inductor")(graph, inputs))
    _counting.regions += 1
    _counting.seconds += time.perf_counter() - start
    if _counting.on_region:
        _counting.on_region()
    return compiled
