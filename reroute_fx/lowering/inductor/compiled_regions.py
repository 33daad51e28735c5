"""The `inductor` backend: each distinct region is compiled when it is first called, for any numbers of rows.

The compiler is handed the sizes as they were exported: widths are numbers, numbers of rows are symbols. What it takes
for granted of the symbols is checked at each call, and a region is compiled again for sizes of which it doesn't hold.
"""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._inductor import standalone_compile

from ..implementations import use_implementations
from ..regions import Regions, device_key, share_regions
from .sizes import Sizes

_regions: dict[str, Callable[..., Any]] = {}
"""Those of this process that take any sizes: other tiers of a model, and other models, have layers in common."""


@dataclass
class Compilations:
    """What was compiled so far in the calls of one program.

    Attributes:
        regions: how often a region was compiled.
        seconds: spent on it.
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
            return _CompiledRegion(region, device, dynamic)
        key = device_key(region, device)
        if key not in _regions:
            _regions[key] = _CompiledRegion(region, device, dynamic)
        return _regions[key]

    return share_regions(module, compile_region, lambda region: use_implementations(region, device).forward)


class _CompiledRegion:
    """A region, compiled for the sizes that it was called with and others of which the same holds."""

    def __init__(self, region: fx.GraphModule, device: torch.device, dynamic: bool) -> None:
        self.values = [node.meta["val"] for node in region.graph.find_nodes(op="placeholder")]
        self.region = use_implementations(copy.deepcopy(region), device)
        self.dynamic = dynamic
        self.compiled: list[tuple[Sizes, Callable[..., Any]]] = []

    def __call__(self, *inputs: Any) -> Any:
        for sizes, run in self.compiled:
            numbers = sizes.numbers(inputs)
            if sizes.hold(numbers):
                return run(*(numbers if sizes.symbols else ()), *inputs)
        start = time.perf_counter()
        self.compiled.append(self._compile(inputs))
        _counting.regions += 1
        _counting.seconds += time.perf_counter() - start
        if _counting.on_region:
            _counting.on_region()
        return self(*inputs)

    def _compile(self, inputs: tuple[Any, ...]) -> tuple[Sizes, Callable[..., Any]]:
        sizes = Sizes(self.values, inputs, self.dynamic)
        run = _compile_graph(self.region, sizes)
        if sizes.hold(sizes.numbers(inputs)):
            return sizes, run
        # The compiler took for granted what doesn't hold of a single row.
        sizes = Sizes(self.values, inputs, dynamic=False)
        return sizes, _compile_graph(self.region, sizes)


def _compile_graph(region: fx.GraphModule, sizes: Sizes) -> Callable[..., Any]:
    """Before: a graph of tensors and sizes. After: a function that takes the number of each symbol before them.

    Only of numbers that are inputs does the compiler's cache remember what it took for granted.
    """
    graph = copy.deepcopy(region)
    with graph.graph.inserting_before(next(iter(graph.graph.nodes))):
        for symbol in sizes.symbols:
            graph.graph.placeholder(f"size_{symbol}")
    graph.recompile()
    with tracing(TracingContext(sizes.fake_mode)):
        compiled: Callable[..., Any] = standalone_compile(
            graph, [*sizes.symbols.values(), *sizes.fakes], dynamic_shapes="from_tracing_context"
        )
    return compiled
