"""The `inductor` backend: each distinct region through `torch.compile`, lengths dynamic."""

import torch
from torch import fx

from .implementations import use_references
from .regions import Regions, share_regions


def lower(module: fx.GraphModule, dynamic: bool) -> Regions:
    """Graph module whose regions are compiled at their first call."""

    def compile_region(region: fx.GraphModule) -> torch.nn.Module:
        return torch.compile(use_references(region), dynamic=dynamic, fullgraph=True)

    return share_regions(module, compile_region)
