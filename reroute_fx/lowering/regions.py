"""Split a decoder graph into regions and let equal regions share one function.

The layers of a decoder are the same code with other weights. Compiling each distinct region once and
calling it for every layer keeps compile time independent of depth.

A region is a run of nodes of one decoder layer, or of the nodes between two layers (decide, compact), where restoring
is a region of its own. Parameters are inputs of a region. Sizes are read from the tensors at hand, so that equal
regions look equal whatever the length they run on; keep counts come in as integers.

A region that a compiler can save little in is not compiled, for that takes it seconds: a single operator, or a few
that run once.
"""

import operator
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from ..passes.graph_edit import expression, memory_order

aten = torch.ops.aten
_FEW = 10
"""Operators of a region that is called once, up to which it is not compiled."""


@dataclass(frozen=True)
class Regions:
    """A graph whose calls are regions.

    Attributes:
        module: the outer graph module; inputs and outputs as before. ``meta["sizes"]`` of a call are those of its
            inputs: calls of one region for which they are equal are of equal sizes in every run.
        calls: calls of compiled regions in the graph.
        compiled: what is called for them, one for each distinct region.
        others: what is called for the regions that are not compiled.
    """

    module: fx.GraphModule
    calls: int
    compiled: tuple[Callable[..., Any], ...]
    others: tuple[Callable[..., Any], ...]


def share_regions(
    module: fx.GraphModule,
    compile_region: Callable[[fx.GraphModule], Callable[..., Any]],
    take_region: Callable[[fx.GraphModule], Callable[..., Any] | None] = lambda region: region.forward,
) -> Regions:
    """Outer graph over the regions of `module`.

    Args:
        module: graph to split; not changed.
        compile_region: called once for each distinct region that is compiled.
        take_region: called once for each other one; what it returns None for is compiled as well.
    """
    regions = [_Region(run) for run in _runs(module.graph)]
    keys = [region_key(region.graph) for region in regions]
    calls = Counter(keys)
    compiled: dict[str, Callable[..., Any]] = {}
    others: dict[str, Callable[..., Any]] = {}
    for region, key in zip(regions, keys, strict=True):
        if key in compiled or key in others:
            continue
        graph, name = fx.GraphModule({}, region.graph), f"region_{len(compiled) + len(others)}"
        taken = take_region(graph) if region.is_small(calls[key]) else None
        if taken is None:
            compiled[key] = _named(compile_region(graph), name)
        else:
            others[key] = _named(taken, name)
    outer = _outer_graph(module.graph, regions, [(compiled | others)[key] for key in keys])
    compiled_calls = sum(calls[key] for key in compiled)
    return Regions(outer, compiled_calls, tuple(compiled.values()), tuple(others.values()))


def _outer_graph(
    graph: fx.Graph, regions: Iterable["_Region"], functions: Iterable[Callable[..., Any]]
) -> fx.GraphModule:
    outer = _Outer()
    for node in graph.find_nodes(op="placeholder"):
        outer.new[node] = outer.graph.node_copy(node)
    for region, function in zip(regions, functions, strict=True):
        outer.call(function, region)
    outer.graph.output(map_arg(graph.output_node().args[0], outer.new.__getitem__))
    outer.graph.lint()
    return fx.GraphModule({}, outer.graph)


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`function` as one that a graph can call. As a module it would cost several more calls for each layer."""

    def region(*inputs: Any) -> Any:
        return function(*inputs)

    region.__name__ = name
    return region


def _runs(graph: fx.Graph) -> list[list[fx.Node]]:
    """Consecutive calls of one region. Sizes belong to none: each region reads its own."""
    runs: list[list[fx.Node]] = []
    last = None
    for node in graph.nodes:
        if node.op != "call_function" or is_size(node):
            continue
        region = node.meta.get("region") or "between"
        current = region if region.startswith(("layer.", "restore.")) else "between"
        if current != last:
            runs.append([])
            last = current
        runs[-1].append(node)
    return runs


def is_size(node: fx.Node) -> bool:
    """Whether a node computes a size rather than a tensor."""
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, int, float))


class _Outer:
    """The graph that calls the regions."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}

    def call(self, function: Callable[..., Any], region: "_Region") -> None:
        call = self.graph.call_function(function, tuple(self._input(n) for n in region.inputs))
        call.meta["sizes"] = tuple(_sizes(n) for n in region.inputs)
        for i, node in enumerate(region.outputs):
            self.new[node] = self.graph.call_function(operator.getitem, (call, i))

    def _input(self, node: fx.Node) -> fx.Node:
        """What a region reads; sizes are computed here when they are first needed."""
        if node not in self.new:
            self.new[node] = self.graph.node_copy(node, self._input)
        return self.new[node]


class _Region:
    """A run of nodes as a graph of its own.

    Attributes:
        inputs: nodes of the original graph that it reads: tensors and, last, integers.
        outputs: its nodes that are read elsewhere.
        operators: how many it calls.
    """

    def __init__(self, nodes: list[fx.Node]) -> None:
        inside = set(nodes)
        self.operators = sum(node.target is not operator.getitem for node in nodes)
        reads = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside)
        tensors = [n for n in reads if not is_size(n)]
        sizes = [n for n in reads if is_size(n)]
        integers = list(dict.fromkeys(leaf for n in sizes for leaf in _missing(n, tensors)))
        self.inputs = tensors + integers
        self.outputs = [n for n in nodes if any(u not in inside and not is_size(u) for u in n.users)]
        self.graph = fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}
        for i, node in enumerate(self.inputs):
            self.new[node] = self.graph.placeholder(f"input_{i}")
            self.new[node].meta["val"] = node.meta.get("val")
        for node in nodes:
            self.new[node] = self.graph.node_copy(node, self._argument)
        self.graph.output(tuple(self.new[n] for n in self.outputs))

    def is_small(self, calls: int) -> bool:
        """Whether a compiler can save little in it, called so many times by a program."""
        return self.operators == 1 or (calls == 1 and self.operators <= _FEW)

    def _argument(self, node: fx.Node) -> fx.Node:
        """Counterpart of an argument; a size is read from the first tensor that has it."""
        if node not in self.new:
            at_hand = [n for n in self.new if not is_size(n)]
            found = _find(node, at_hand)
            if found is not None:
                self.new[node] = self.graph.call_function(aten.sym_size.int, (self.new[found[0]], found[1]))
            else:
                self.new[node] = self.graph.node_copy(node, self._argument)
        return self.new[node]


def region_key(graph: fx.Graph) -> str:
    """Equal for regions that compute the same function of inputs of the same kind and with the same equal sizes."""
    number = {node: f"%{i}" for i, node in enumerate(graph.nodes)}
    sizes: dict[Any, str] = {}
    lines = [_kind(n, sizes) for n in graph.find_nodes(op="placeholder")]
    for node in graph.nodes:
        args, kwargs = map_arg((node.args, dict(node.kwargs)), number.__getitem__)
        lines.append(f"{node.op} {node.target if node.op == 'call_function' else ''} {args} {kwargs}")
    return "\n".join(lines)


def device_key(region: fx.GraphModule, device: torch.device) -> str:
    """Equal for regions for which the same code is compiled on `device`."""
    return f"{device} {region_key(region.graph)}"


def _sizes(node: fx.Node) -> tuple[Any, ...]:
    """Sizes of a value of a program, in its symbols."""
    fake = node.meta.get("val")
    return tuple(map(expression, fake.shape if isinstance(fake, torch.Tensor) else (fake,)))


def _find(size: fx.Node, tensors: Iterable[fx.Node]) -> tuple[fx.Node, int] | None:
    """A tensor with that size, and in which dimension."""
    value = size.meta["val"]
    if not isinstance(value, torch.SymInt):
        return None
    for tensor in tensors:
        fake = tensor.meta.get("val")
        for dim, other in enumerate(fake.shape if isinstance(fake, torch.Tensor) else ()):
            if isinstance(other, torch.SymInt) and other.node.expr == value.node.expr:
                return tensor, dim
    return None


def _missing(size: fx.Node, tensors: list[fx.Node]) -> list[fx.Node]:
    """Sizes of the graph's inputs that none of the tensors has, of those that `size` is computed from."""
    if _find(size, tensors):
        return []
    if all(is_size(n) for n in size.all_input_nodes):
        return [leaf for n in size.all_input_nodes for leaf in _missing(n, tensors)]
    return [size] if all(n.op == "placeholder" for n in size.all_input_nodes) else []


def _kind(node: fx.Node, sizes: dict[Any, str]) -> str:
    """Dtype, device, shape and order in memory; `sizes` numbers the symbols in the order in which they are met."""
    fake = node.meta.get("val")
    shape = fake.shape if isinstance(fake, torch.Tensor) else (fake,)
    names = [
        sizes.setdefault(size.node.expr, f"s{len(sizes)}") if isinstance(size, torch.SymInt) else str(size)
        for size in shape
    ]
    kind = type(fake).__name__
    if isinstance(fake, torch.Tensor):
        kind = f"{fake.dtype} {fake.device} {memory_order(fake)}"
    return f"{kind} [{', '.join(names)}]"
