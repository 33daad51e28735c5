"""The `inductor` backend: each distinct region is compiled when it is first called, for any numbers of rows.

The compiler is handed the sizes as they were exported: widths are numbers, numbers of rows are symbols. What it takes
for granted of the symbols is checked, and a region is compiled again for sizes of which it doesn't hold. In a run that
is done once for all calls of a region that are of equal sizes, such as the layers of a stage.
"""

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._inductor import standalone_compile

from ...common.collecting import without_collecting
from ...common.pauses import pause
from ..attention_kernels import pin_attention
from ..implementations import use_implementations
from ..regions import Regions, device_key, share_regions
from .sizes import Sizes
from .vector_units import wait_for_answer

_regions: dict[str, "_CompiledRegion"] = {}
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


@without_collecting()
def lower(module: fx.GraphModule, device: torch.device, dynamic: bool) -> tuple[Regions, tuple[str, ...]]:
    """Graph module whose regions are compiled for `device` at their first call, by whichever program.

    Returns:
        The regions, and the kernels of attention that were chosen in them, each once.
    """
    compiled: list[_CompiledRegion] = []

    def compile_region(region: fx.GraphModule) -> Callable[..., Any]:
        compiled.append(_shared(region, device) if dynamic else _CompiledRegion(region, device, dynamic))
        return compiled[-1]

    regions = share_regions(
        module, compile_region, lambda region: use_implementations(region, device).forward
    )
    _choose_once(regions.module, dict(zip(regions.compiled, compiled, strict=True)))
    return regions, tuple(dict.fromkeys(kernel for region in compiled for kernel in region.attention))


def _shared(region: fx.GraphModule, device: torch.device) -> "_CompiledRegion":
    key = device_key(region, device)
    if key not in _regions:
        _regions[key] = _CompiledRegion(region, device, dynamic=True)
    return _regions[key]


def _choose_once(module: fx.GraphModule, compiled: Mapping[Any, "_CompiledRegion"]) -> None:
    """Check sizes once for all calls of a region that are of equal sizes, and pause before each call.

    Before: ``%a = region_1(%x, ...)``, ``%b = region_1(%a, ...)``
    After:  ``%chosen = choose(%x, ...)``, ``pause()``, ``%a = %chosen(%x, ...)``, ``pause()``,
            ``%b = %chosen(%a, ...)``
    """
    chosen: dict[Any, fx.Node] = {}
    for call in [n for n in module.graph.nodes if n.target in compiled]:
        kind = call.target, call.meta["sizes"]
        if kind not in chosen:
            with module.graph.inserting_before(call):
                chosen[kind] = module.graph.call_function(compiled[call.target].choose, call.args)
        with module.graph.inserting_before(call):
            module.graph.call_function(pause)
        call.op, call.target, call.args = "call_method", "__call__", (chosen[kind], *call.args)
    module.recompile()


class _CompiledRegion:
    """A region, compiled for the sizes that it was called with and others of which the same holds."""

    def __init__(self, region: fx.GraphModule, device: torch.device, dynamic: bool) -> None:
        self.values = [node.meta["val"] for node in region.graph.find_nodes(op="placeholder")]
        self.region = use_implementations(copy.deepcopy(region), device)
        self.attention = pin_attention(self.region, device)
        self.dynamic = dynamic
        self.compiled: list[tuple[Sizes, Callable[..., Any]]] = []

    def __call__(self, *inputs: Any) -> Any:
        return self.choose(*inputs)(*inputs)

    def choose(self, *inputs: Any) -> Callable[..., Any]:
        """What runs on `inputs`, and on any others of their sizes; compiled now if nothing does yet."""
        for sizes, run in self.compiled:
            numbers = sizes.numbers(inputs)
            if sizes.hold(numbers):
                return partial(run, *numbers) if sizes.symbols else run
        start = time.perf_counter()
        self.compiled.append(self._compile(inputs))
        _counting.regions += 1
        _counting.seconds += time.perf_counter() - start
        if _counting.on_region:
            _counting.on_region()
        return self.choose(*inputs)

    @without_collecting()
    def _compile(self, inputs: tuple[Any, ...]) -> tuple[Sizes, Callable[..., Any]]:
        wait_for_answer()
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
