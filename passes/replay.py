"""Replay part of a graph on another set of tokens.

Replaying copies nodes under a mapping: the residual stream becomes the compact stream, a sequence
tensor (cos, sin, ...) its compact form, the sequence length the compact length. Sequence tensors
are recognised by the length symbol in their shape.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import sympy
import torch
from torch import fx

from .base_errors import MatchError
from .graph_edit import (
    Editor,
    aten,
    expression,
    is_tensor,
    mentions,
    sequence_dims,
    shape,
    value,
)
from .model_graph import Layer
from .shared_caches import shared_states


class TokenSet(Protocol):
    """Which rows of the stream a replay runs on.

    Attributes:
        length: number of rows, a node or an int.
        fakes: values of nodes that were copied onto these rows, by what they were on all rows.
        masks: those of attentions on all rows, and what stands for them on these.
    """

    length: Any
    fakes: dict[Any, torch.Tensor]
    masks: dict[fx.Node, fx.Node]

    def rows(self, edit: Editor, tensor: fx.Node, dim: int) -> fx.Node:
        """Rows of a sequence tensor that runs over the stream in dimension `dim`."""

    def shared(self, edit: Editor, states: fx.Node) -> fx.Node:
        """Those of keys or values ``[B, Hkv, S, D]`` that an earlier layer shares."""


class ChosenTokens:
    """Some tokens of each row.

    Args:
        positions: where they are in the stream, ``[B, n]``; S and above stand for none.
        length: n.
        instead: sequence tensors in the place of which others are read.
    """

    def __init__(self, positions: fx.Node, length: Any, instead: Mapping[fx.Node, fx.Node]) -> None:
        self.fakes: dict[Any, torch.Tensor] = {}
        self.masks: dict[fx.Node, fx.Node] = {}
        self.positions, self.length, self.instead = positions, length, instead

    def rows(self, edit: Editor, tensor: fx.Node, dim: int) -> fx.Node:
        return compact(edit, [self.instead.get(tensor, tensor)], self.positions, [dim])[0]

    def shared(self, edit: Editor, states: fx.Node) -> fx.Node:
        return compact_heads(edit, states, self.positions)


def last_tokens(edit: Editor, lengths: fx.Node, instead: Mapping[fx.Node, fx.Node]) -> ChosenTokens:
    """The last token of each row, of which `lengths` ``[B]`` says how many tokens it has."""
    positions = edit.call(aten.unsqueeze.default, edit.call(aten.sub.Tensor, lengths, 1), 1)
    return ChosenTokens(positions, 1, instead)


class AllRows:
    """The stream as it is.

    Args:
        instead: as for `ChosenTokens`.
    """

    length = None

    def __init__(self, instead: Mapping[fx.Node, fx.Node]) -> None:
        self.fakes: dict[Any, torch.Tensor] = {}
        self.masks: dict[fx.Node, fx.Node] = {}
        self.instead = instead

    def rows(self, edit: Editor, tensor: fx.Node, dim: int) -> fx.Node:
        return self.instead.get(tensor, tensor)

    def shared(self, edit: Editor, states: fx.Node) -> fx.Node:
        return states


def compact(edit: Editor, tensors: list[fx.Node], positions: fx.Node, dims: list[int]) -> list[fx.Node]:
    """Rows of sequence tensors at `positions`."""
    return edit.unpack(edit.call(torch.ops.reroute.compact_tokens.default, tensors, positions, dims))


def compact_heads(edit: Editor, states: fx.Node, positions: fx.Node) -> fx.Node:
    """Rows of keys or values ``[B, Hkv, S, D]`` at `positions`."""
    (rows,) = compact(edit, [edit.call(aten.transpose.int, states, 1, 2)], positions, [1])
    return edit.call(aten.transpose.int, rows, 1, 2)


def is_sequence_tensor(node: fx.Node, length: sympy.Expr, batch: sympy.Expr) -> bool:
    """Whether one dimension runs over the stream and the one before it over the batch, or all of it (size 1)."""
    dims = sequence_dims(node, length)
    if len(dims) != 1 or dims[0] == 0:
        return False
    before = expression(shape(node)[dims[0] - 1])
    return before == batch or (before == 1 and dims[0] == 1)


def sequence_inputs(layers: Iterable[Layer]) -> list[fx.Node]:
    """Sequence tensors that `layers` read besides the residual stream and shared keys and values, in graph order."""
    layers = list(layers)
    shared = {states for layer in layers for states in shared_states(layer)}
    batch, length = (expression(size) for size in shape(layers[0].start)[:2])
    streams = {layer.start for layer in layers}
    inside = {node for layer in layers for node in layer.nodes}
    found: dict[fx.Node, None] = {}
    stack = [n for node in inside for n in node.all_input_nodes if n not in inside | streams | shared]
    while stack:
        node = stack.pop()
        if not is_tensor(node) or not sequence_dims(node, length):
            continue
        if is_sequence_tensor(node, length, batch):
            found[node] = None
        else:
            stack += node.all_input_nodes
    order = {node: i for i, node in enumerate(layers[0].start.graph.nodes)}
    return sorted(found, key=order.__getitem__)


class Replay:
    """Copies nodes onto `tokens`, remembering what became of each node.

    Args:
        edit: where the copies go.
        tokens: rows to run on.
        length: symbol of the sequence length in the original graph.
        batch: its batch size.
        mapping: nodes whose counterparts are given, the residual stream first of all.
    """

    def __init__(
        self,
        edit: Editor,
        tokens: TokenSet,
        length: sympy.Expr,
        batch: sympy.Expr,
        mapping: Mapping[fx.Node, Any],
    ) -> None:
        self.edit = edit
        self.tokens = tokens
        self.symbol = length
        self.batch = batch
        self.counterparts: dict[fx.Node, Any] = dict(mapping)
        self.given = frozenset(mapping)
        self.shared = frozenset(states for layer in edit.graph.layers for states in shared_states(layer))
        self.sizes: dict[sympy.Expr, Any] = {}

    def run(self, nodes: Iterable[fx.Node]) -> None:
        """Copy `nodes`, which are in graph order."""
        for node in nodes:
            if node not in self.counterparts:
                self.counterparts[node] = self.edit.copy(node, self, self._substituted(value(node)))

    def _substituted(self, fake: Any) -> Any:
        """The fake value of a node with the compact length for the full one; None if it must be computed.

        Running every copied node on fake tensors takes most of a routing's time otherwise, and making a tensor for
        each takes a third of what is left: layers are alike.
        """
        new_length = self.tokens.length
        only_length_changes = len(self.given) == 1 and isinstance(new_length, fx.Node)
        if not only_length_changes or not isinstance(fake, torch.Tensor):
            return None
        sizes = (*fake.shape, *fake.stride())
        form = fake.dtype, fake.device, *map(expression, sizes)
        if form not in self.tokens.fakes:
            resized = [self._resized(size) for size in sizes]
            with self.edit.graph.fake_mode:
                self.tokens.fakes[form] = torch.empty_strided(
                    resized[: fake.ndim], resized[fake.ndim :], dtype=fake.dtype, device=fake.device
                )
        return self.tokens.fakes[form]

    def _resized(self, size: Any) -> Any:
        if not isinstance(size, torch.SymInt) or not mentions(size, self.symbol):
            return size
        old = expression(size)
        if old not in self.sizes:
            new = old.subs(self.symbol, expression(value(self.tokens.length)))
            self.sizes[old] = size.node.shape_env.create_symintnode(new, hint=None)
        return self.sizes[old]

    def __call__(self, node: fx.Node) -> Any:
        """Counterpart of a node, made on demand for what comes from outside the copied nodes."""
        if node not in self.counterparts:
            self.counterparts[node] = self._outside(node)
        return self.counterparts[node]

    def _outside(self, node: fx.Node) -> Any:
        if isinstance(self.tokens, AllRows):
            return self.tokens.instead.get(node, node)
        if node in self.shared:
            return self.tokens.shared(self.edit, node)
        if not is_tensor(node):
            return self._size(node)
        if node in self.tokens.masks:
            return self.tokens.masks[node]
        dims = sequence_dims(node, self.symbol)
        if not dims:
            return node
        if is_sequence_tensor(node, self.symbol, self.batch):
            return self.tokens.rows(self.edit, node, dims[0])
        has_source = any(is_tensor(n) and sequence_dims(n, self.symbol) for n in node.all_input_nodes)
        if 0 in dims or not has_source:
            raise MatchError(
                f"%{node.name} of shape {list(shape(node))} runs over the sequence in a layout that can't be "
                f"compacted; expected [..., batch, sequence, ...]."
            )
        return self.edit.copy(node, self)

    def _size(self, node: fx.Node) -> Any:
        size = value(node)
        if not mentions(size, self.symbol):
            return node
        if expression(size) == self.symbol:
            return self.tokens.length
        return self.edit.copy(node, self)
