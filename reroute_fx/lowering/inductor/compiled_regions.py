"""The `inductor` backend: each distinct region through `torch.compile`, lengths dynamic."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch._dynamo import lookup_backend

from ..implementations import use_implementations
from ..regions import Regions, share_regions


@dataclass
class Compilations:
    """What was compiled so far.

    Attributes:
        regions: how often a region was compiled.
        seconds: spent on it, without tracing.
        on_region: called after each.
    """

    regions: int = 0
    seconds: float = 0.0
    on_region: Callable[[], None] | None = None


def lower(module: fx.GraphModule, device: torch.device, dynamic: bool, compilations: Compilations) -> Regions:
    """Graph module whose regions are compiled for `device` at their first call, and counted."""

    def compile_graph(graph: fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        start = time.perf_counter()
        compiled = cast(Callable[..., Any], lookup_backend("inductor")(graph, inputs))
        compilations.regions += 1
        compilations.seconds += time.perf_counter() - start
        if compilations.on_region:
            compilations.on_region()
        return compiled

    def compile_region(region: fx.GraphModule) -> Callable[..., Any]:
        forward = use_implementations(region, device).forward
        return torch.compile(forward, backend=compile_graph, dynamic=dynamic, fullgraph=True)

    return share_regions(module, compile_region)
