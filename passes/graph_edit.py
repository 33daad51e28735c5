"""The small vocabulary in which the passes read and edit a graph."""

import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.node import map_arg

from .decoder_graph import DecoderGraph

aten = torch.ops.aten
FULL_SLICE_END = 2**63 - 1


def is_op(node: Any, *targets: Any) -> bool:
    """Whether `node` calls one of `targets`; an op packet stands for all its overloads."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    return any(node.target is t or getattr(node.target, "overloadpacket", None) is t for t in targets)


def value(node: Any) -> Any:
    """Fake value of a node: what it would return, without data."""
    return node.meta["val"]


def shape(node: Any) -> torch.Size:
    size: torch.Size = value(node).shape
    return size


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def expression(size: Any) -> sympy.Expr:
    """A size, symbolic or not, as a sympy expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.sympify(size)


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are the same expression; never adds a guard."""
    return bool(expression(a) == expression(b))


def mentions(size: Any, length: sympy.Expr) -> bool:
    """Whether a size depends on the symbol `length`."""
    return bool(expression(size).free_symbols & length.free_symbols)


def named_arguments(node: Any) -> dict[str, Any]:
    """Arguments of a call by schema name, defaults filled in."""
    schema = node.target._schema.arguments
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | dict(node.kwargs)
    return {a.name: given.get(a.name, a.default_value) for a in schema}


class Editor:
    """Emits nodes at one place of the graph, each with its fake value and region."""

    def __init__(self, graph: DecoderGraph, region: str) -> None:
        self.graph = graph
        self.region = region
        self.emitted: list[fx.Node] = []

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A new call; its fake value is computed from those of its arguments."""
        node = self.graph.fx_graph.call_function(target, args, kwargs)
        node.meta["region"] = self.region
        # The Python dispatcher keeps composite operators from asking for concrete sizes (seen in torch 2.11).
        with self.graph.fake_mode, enable_python_dispatcher(), torch.no_grad():
            node.meta["val"] = target(*map_arg(args, value), **map_arg(kwargs, value))
        self.emitted.append(node)
        return node

    def copy(self, original: fx.Node, replaced: Callable[[fx.Node], Any], fake: Any = None) -> fx.Node:
        """The call `original` with other arguments, its provenance kept.

        `fake` is the value of the copy when the caller knows it; otherwise it is computed.
        """
        args, kwargs = map_arg(original.args, replaced), map_arg(original.kwargs, replaced)
        if fake is None:
            node = self.call(original.target, *args, **kwargs)  # type: ignore[arg-type]
        else:
            node = self.graph.fx_graph.call_function(original.target, args, kwargs)  # type: ignore[arg-type]
            node.meta = {"val": fake, "region": self.region}
            self.emitted.append(node)
        node.meta = original.meta | node.meta
        return node

    def size(self, node: fx.Node, dim: int) -> fx.Node:
        return self.call(aten.sym_size.int, node, dim)

    def unpack(self, node: fx.Node) -> list[fx.Node]:
        """One node for each element of a call that returns several values."""
        return [self.call(operator.getitem, node, i) for i in range(len(value(node)))]


@contextmanager
def edit_after(graph: DecoderGraph, node: fx.Node, region: str) -> Iterator[Editor]:
    """An `Editor` that emits right after `node`, in order."""
    with graph.fx_graph.inserting_before(node.next):
        yield Editor(graph, region)


def descendants(node: fx.Node) -> set[fx.Node]:
    """Tensors computed from `node`, itself included. Sizes carry no data and are not followed."""
    found, stack = {node}, [node]
    while stack:
        for user in stack.pop().users:
            carries = user.op == "output" or not isinstance(
                user.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, int)
            )
            if carries and user not in found:
                found.add(user)
                stack.append(user)
    return found


def ancestors(nodes: Iterable[fx.Node], stop: fx.Node | None = None) -> set[fx.Node]:
    """Everything that `nodes` are computed from, themselves included, not looking past `stop`."""
    found, stack = set(nodes), list(nodes)
    while stack:
        node = stack.pop()
        if node is stop:
            continue
        for source in node.all_input_nodes:
            if source not in found:
                found.add(source)
                stack.append(source)
    return found


def sequence_dims(node: fx.Node, length: sympy.Expr) -> list[int]:
    """Dimensions of a tensor that run over the rows of the stream."""
    return [i for i, size in enumerate(shape(node)) if same_size(size, length)]
