"""The small vocabulary in which the passes read and edit a graph."""

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic
from torch.fx.node import map_arg
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from .model_graph import ModelGraph

aten = torch.ops.aten
NO_TOKEN = 2**63 - 1
"""A position past the end of every stream."""


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
    """A size or what is computed of sizes, symbolic or not, as a sympy expression."""
    is_symbolic = isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool))
    return size.node.expr if is_symbolic else sympy.sympify(size)


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are the same expression; never adds a guard."""
    return bool(expression(a) == expression(b))


def mentions(size: Any, length: sympy.Expr) -> bool:
    """Whether a size depends on the symbol `length`."""
    return not isinstance(size, int) and bool(expression(size).free_symbols & length.free_symbols)


def named_arguments(node: Any) -> dict[str, Any]:
    """Arguments of a call by schema name, defaults filled in."""
    schema = node.target._schema.arguments
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | dict(node.kwargs)
    return {a.name: given.get(a.name, a.default_value) for a in schema}


class Editor:
    """Emits nodes at one place of the graph, each with its fake value and region."""

    def __init__(self, graph: ModelGraph, region: str) -> None:
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

    def copy_all(self, nodes: Iterable[fx.Node], copies: dict[fx.Node, fx.Node]) -> dict[fx.Node, fx.Node]:
        """`copies`, and copies of `nodes`, which are in graph order, that read them."""
        for node in nodes:
            copies[node] = self.copy(node, lambda source: copies.get(source, source))
        return copies

    def size(self, node: fx.Node, dim: int) -> fx.Node:
        return self.call(aten.sym_size.int, node, dim)

    def unpack(self, node: fx.Node) -> list[fx.Node]:
        """One node for each element of a call that returns several values."""
        return [self.call(operator.getitem, node, i) for i in range(len(value(node)))]


@contextmanager
def edit_after(graph: ModelGraph, node: fx.Node, region: str) -> Iterator[Editor]:
    """An `Editor` that emits right after `node`, in order."""
    with graph.fx_graph.inserting_before(node.next):
        yield Editor(graph, region)


def add_input(graph: ModelGraph, name: str, size: Sequence[Any], dtype: torch.dtype) -> fx.Node:
    """A new input of the graph after all others, on the device of the stream.

    `size` holds fixed sizes, symbolic ones that other inputs have, and strings: a string is the name of a new
    symbolic size, or of one that an earlier new input brought in.
    """
    stream = _stream(graph)
    with graph.fx_graph.inserting_before(graph.inputs[-1].next):
        node = graph.fx_graph.placeholder(name)
    sizes = [new_size(graph, s) if isinstance(s, str) else s for s in size]
    with graph.fake_mode:
        node.meta["val"] = torch.empty(sizes, dtype=dtype, device=stream.device)
    graph.added_inputs += (node,)
    return node


def _stream(graph: ModelGraph) -> torch.Tensor:
    stream: torch.Tensor = value(graph.layers[0].start if graph.layers else graph.states[0])
    return stream


def new_size(graph: ModelGraph, name: str) -> torch.SymInt:
    """The symbolic size `name`, made when it is first asked for."""
    if name not in graph.new_sizes:
        like: Any = _stream(graph).shape[-2]
        env = graph.fake_mode.shape_env
        assert env is not None
        # The hint only steers size-1 specialisation: an ordinary length, different for each size.
        hint = max(2, int(like.node.hint) * 3 // 4 - len(graph.new_sizes))
        source = ConstantSource(f"{name}_{len(env.var_to_range)}")
        symbol = env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
        size = env.create_symintnode(symbol, hint=hint, source=source)
        assert isinstance(size, torch.SymInt)
        env.var_to_range[size.node.expr] = ValueRanges(1, int_oo)
        graph.new_sizes[name] = size
    return graph.new_sizes[name]


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


def memory_order(fake: torch.Tensor) -> list[int]:
    """Dimensions of a tensor from the slowest to the fastest in memory."""
    strides = [hint(stride) for stride in fake.stride()]
    return sorted(range(fake.ndim), key=lambda dim: (-strides[dim], dim))


def hint(size: Any) -> int:
    """What a size was when the program was captured."""
    return size if isinstance(size, int) else int(size.node.hint)
