"""The `inductor` backend: each distinct region through `torch.compile`, lengths dynamic."""

from typing import cast

import torch
from torch import fx

from .implementations import use_references
from .regions import Regions, share_regions


def lower(module: fx.GraphModule, dynamic: bool) -> Regions:
    """Graph module whose regions are compiled at their first call."""

    def compile_region(region: fx.GraphModule) -> torch.nn.Module:
        compiled = torch.compile(use_references(region), dynamic=dynamic, fullgraph=True)
        return cast(torch.nn.Module, compiled)

    return share_regions(module, compile_region)
