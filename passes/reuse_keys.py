"""Compute the keys of a decision layer once.

Scoring needs them for all rows of the stream; the layer computes them again for the rows that are kept.

Before: ``%all = linear(norm(%h), %W)`` for scoring, ``%c, ... = compact_tokens([%h, ...], %positions)``,
        ``%k = linear(norm(%c), %W)``
After:  ``%c, ..., %k = compact_tokens([%h, ..., %all], %positions)``; norms and rotary positions stay as they are

This is value numbering with one more relation: what a compaction returns are rows of what it takes, and a call
that treats each row alone gives, of rows of its arguments, rows of its result. Matrix products that are found
this way, whatever they project to, become part of the compaction. Places without a row hold zeros instead of
the product of a zero row; nothing reads them.
"""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.node import map_arg

from .decoder_graph import DecoderGraph
from .graph_edit import (
    aten,
    edit_after,
    expression,
    is_op,
    is_tensor,
    mentions,
    sequence_dims,
    shape,
    value,
)
from .interface import Pass, PassResult, Rejection
from .replay import is_sequence_tensor
from .token_mixing import TokenMixing
from .token_rows import Rows

PRODUCTS = (aten.linear, aten.matmul, aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.einsum)


class ReuseKeys(Pass):
    requires = ("stages",)
    excludes = ("outputs",)

    def apply(self, graph: DecoderGraph) -> PassResult:
        numbers = _ValueNumbers(graph)
        mixing: dict[sympy.Expr, TokenMixing] = {}
        reused, rejected = 0, []
        for call in _first_compactions(graph):
            stream = call.args[0][0]  # type: ignore[index]
            length = expression(shape(stream)[1])
            if length not in mixing:
                mixing[length] = TokenMixing(graph.fx_graph.nodes, stream)  # type: ignore[arg-type]
            compaction = _Compaction(call, numbers, mixing[length])
            products = compaction.products()
            if products:
                _gather(graph, compaction, products)
                reused += len(products)
            else:
                rejected += compaction.nearest_miss()
        return PassResult(self.name, matched=reused, rewritten=reused, rejected=tuple(rejected))


def _first_compactions(graph: DecoderGraph) -> list[fx.Node]:
    """For each decision the compaction that its layer starts from."""
    first: dict[Any, fx.Node] = {}
    for node in graph.fx_graph.nodes:
        if is_op(node, torch.ops.reroute.compact_tokens):
            first.setdefault(node.args[1], node)
    return [first[d.positions] for d in graph.decisions if d.positions in first]


class _ValueNumbers:
    """For each call of a graph the first one that computes the same.

    Attributes:
        order: place of each node in the graph.
        first: the first of the calls that compute the same.
    """

    def __init__(self, graph: DecoderGraph) -> None:
        self.order = {node: place for place, node in enumerate(graph.fx_graph.nodes)}
        self.first: dict[fx.Node, fx.Node] = {}
        self._of_key: dict[str, fx.Node] = {}
        for node in graph.fx_graph.find_nodes(op="placeholder"):
            self.first[node] = node
        for node in graph.fx_graph.nodes:
            if node.op == "call_function" and not _is_random(node):
                self.first[node] = self._of_key.setdefault(_key(node, self._argument), node)

    def find(self, node: fx.Node, replaced: Callable[[fx.Node], Any]) -> fx.Node | None:
        """The first call like `node`, with its arguments replaced."""
        return self._of_key.get(_key(node, replaced))

    def _argument(self, node: fx.Node) -> Any:
        return _size(node) or self.first.get(node, node)


def _key(node: fx.Node, replaced: Callable[[fx.Node], Any]) -> str:
    """Equal for calls that compute the same."""
    args, kwargs = map_arg((node.args, dict(node.kwargs)), replaced)
    return f"{node.target} {args} {kwargs}"


def _size(node: fx.Node, replaced: dict[sympy.Expr, sympy.Expr] | None = None) -> str:
    """A symbolic size in words; empty for other nodes. Nodes that read one size from two tensors are equal."""
    size = node.meta.get("val")
    return f"size {expression(size).subs(replaced or {})}" if isinstance(size, torch.SymInt) else ""


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


class _Compaction:
    """A compaction at a decision's positions, and the later nodes that are rows of earlier ones.

    Attributes:
        call: the call.
        length: S, rows of the stream.
        active: S', rows that it returns.
        sources: for each such node the tensor whose rows it has.
    """

    def __init__(self, call: fx.Node, numbers: _ValueNumbers, mixing: TokenMixing) -> None:
        arguments: Any = call.args
        tensors, positions, dims = arguments
        self.call, self.numbers, self.mixing = call, numbers, mixing
        self.batch, self.active = (expression(size) for size in shape(positions))
        self.length = expression(shape(tensors[0])[dims[0]])
        self.sources = {rows: self._number(tensors[rows.args[1]]) for rows in call.users}
        for node in self._later():
            if not self.sources.keys().isdisjoint(node.all_input_nodes):
                source = numbers.find(node, self._source)
                if source is not None and self._is_before(source) and self._treats_rows_alone(source):
                    self.sources[node] = source

    def products(self) -> list[fx.Node]:
        """Matrix products to gather instead: of several in a chain the last, and those that are read besides."""
        candidates = {
            node
            for node, source in self.sources.items()
            if is_op(node, *PRODUCTS) and is_sequence_tensor(source, self.length, self.batch)
        }
        needed: dict[fx.Node, None] = {}
        for node in reversed(self.sources):
            if any(u not in self.sources or (u in needed and u not in candidates) for u in node.users):
                needed[node] = None
        return [node for node in reversed(needed) if node in candidates]

    def nearest_miss(self) -> list[Rejection]:
        """The first product with the weights of one that is there for all rows, if any."""
        before = {
            self._weights(node, self.length): node
            for node in self.numbers.first
            if is_op(node, *PRODUCTS) and self._is_before(node) and _runs_over(node, self.length)
        }
        for node in self._later():
            if is_op(node, *PRODUCTS) and _runs_over(node, self.active):
                other = before.get(self._weights(node, self.active))
                if other is not None:
                    return [Rejection(node.name, self._why_not(node, other))]
        return []

    def _why_not(self, node: fx.Node, other: fx.Node) -> str:
        if node in self.sources:
            return f"%{other.name} of shape {list(shape(other))} has a layout that can't be compacted"
        return f"it has the weights of %{other.name}, but does not read rows of what that one reads"

    def _treats_rows_alone(self, node: fx.Node) -> bool:
        """Whether each row of the result is computed from the same row of the arguments."""
        if is_op(node, aten.scaled_dot_product_attention) or node in self.mixing.reasons:
            return False
        if _runs_over(node, self.length) and not isinstance(self.mixing.places[node], Rows):
            return False
        sizes = [expression(size) for size in shape(node)] if is_tensor(node) else []
        return all(
            size in (self.length, self.batch * self.length) for size in sizes if mentions(size, self.length)
        )

    def _later(self) -> Iterator[fx.Node]:
        return (n for n in self.numbers.first if self.numbers.order[n] > self.numbers.order[self.call])

    def _is_before(self, node: fx.Node) -> bool:
        return self.numbers.order[node] < self.numbers.order[self.call]

    def _source(self, node: fx.Node) -> Any:
        return _size(node, {self.active: self.length}) or self.sources.get(node) or self._number(node)

    def _number(self, node: fx.Node) -> fx.Node:
        return self.numbers.first.get(node, node)

    def _weights(self, product: fx.Node, length: sympy.Expr) -> tuple[Any, ...]:
        inputs = [n for n in product.all_input_nodes if is_tensor(n) and not _runs_over(n, length)]
        return product.target, *map(self._number, inputs)


def _runs_over(node: fx.Node, length: sympy.Expr) -> bool:
    return is_tensor(node) and any(mentions(size, length) for size in shape(node))


def _gather(graph: DecoderGraph, compaction: _Compaction, products: list[fx.Node]) -> None:
    """Let the compaction return the rows of `products` too."""
    call = compaction.call
    arguments: Any = call.args
    tensors, positions, dims = arguments
    sources = [compaction.sources[node] for node in products]
    more = [sequence_dims(source, compaction.length)[0] for source in sources]
    call.args = ([*tensors, *sources], positions, [*dims, *more])
    with graph.fake_mode:
        call.meta["val"] = call.target(*map_arg(call.args, value))  # type: ignore[operator]
    with edit_after(graph, call, region=call.meta["region"]) as edit:
        for place, node in enumerate(products, start=len(tensors)):
            node.replace_all_uses_with(edit.call(operator.getitem, call, place))
