"""The `inductor` backend: each distinct region through `torch.compile`, lengths dynamic."""

from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx
from torch._dynamo import lookup_backend

from .implementations import use_references
from .regions import Regions, share_regions


def lower(module: fx.GraphModule, dynamic: bool, counter: Counter[str]) -> Regions:
    """Graph module whose regions are compiled at their first call; each time counts in `counter`."""

    def compile_graph(graph: fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        counter["compilations"] += 1
        return cast(Callable[..., Any], lookup_backend("inductor")(graph, inputs))

    def compile_region(region: fx.GraphModule) -> Callable[..., Any]:
        forward = use_references(region).forward
        return torch.compile(forward, backend=compile_graph, dynamic=dynamic, fullgraph=True)

    return share_regions(module, compile_region)
