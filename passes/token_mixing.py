"""Which calls of a graph let tokens of the sequence see each other.

A layer can run on a subset of the tokens only if nothing but its attention lets them. Every tensor is followed from
the inputs on: the dimension that counts its tokens, that of the batch, or both in one after ``reshape(-1, d)``. A call
passes if a rule says that it computes each token from that token alone, see `token_rules`. What has no rule is taken
to mix. So is what computes with the number of tokens: on fewer it would compute something else.
"""

import operator
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import fx

from .canonicalize_attention import ATTENTION
from .graph_edit import aten, expression, is_op, is_tensor, mentions, named_arguments, shape, value
from .recurrences import RECURRENCES, token_arguments
from .token_rows import Axis, Mixes, Place, Rows, Several
from .token_rules import Call, rule_of

_SIZES = ("size", "shape", "sizes", "repeats")
"""Arguments that say how large a result is and nothing about what it holds."""
_FILLED = (
    *(
        aten.empty,
        aten.full,
        aten.ones,
        aten.zeros,
        aten.arange,
        aten.expand,
        aten.expand_as,
        aten.repeat,
        aten.tile,
    ),
)
"""What makes a tensor that runs over tokens of none that does."""
_NEW = (aten.new_empty, aten.new_full, aten.new_ones, aten.new_zeros)


class TokenMixing:
    """The calls of a graph that let tokens see each other, and where tokens lie in what each call returns.

    Args:
        nodes: a graph, in order.
        stream: ``[B, S, d]``.
        attentions: canonical attentions, which are let through.

    Attributes:
        reasons: why, for each call that does.
        places: for each node.
    """

    def __init__(self, nodes: Iterable[fx.Node], stream: fx.Node) -> None:
        self.batch, self.length = (expression(size) for size in shape(stream)[:2])
        self.reasons: dict[fx.Node, str] = {}
        self.places: dict[fx.Node, Any] = {}
        for node in nodes:
            if node.op == "placeholder":
                self.places[node] = self._by_shape(node)
            elif node.op == "call_function":
                self.places[node] = self._follow(node)

    def attends_along_tokens(self, attention: fx.Node) -> bool:
        """Whether the query, keys and values of a canonical attention have tokens where it looks for them."""
        places = [self.places.get(source) for source in attention.args[:3]]  # type: ignore[arg-type]
        return all(
            isinstance(p, Rows) and p.tokens == Axis(2) and p.batch in (None, Axis(0)) and p.order is None
            for p in places
        )

    def _follow(self, node: fx.Node) -> Any:
        try:
            return self._place(node)
        except Mixes as why:
            self.reasons[node] = f"it lets tokens see each other ({node.target}): {why}"
        except _CountsTokens as what:
            self.reasons[node] = f"it computes with the number of tokens ({node.target}): {what}"
        return self._by_shape(node)

    def _place(self, node: fx.Node) -> Any:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise Mixes("it runs a graph of its own")
        if node.target is operator.getitem:
            source, index = node.args
            place = self.places.get(source)  # type: ignore[arg-type]
            return place[index] if isinstance(place, tuple) else place  # type: ignore[index]
        if not _returns_tensors(node):
            return None
        self._refuse_lengths(node)
        if is_op(node, *ATTENTION):
            return self.places[node.args[0]]  # type: ignore[index]
        if is_op(node, *RECURRENCES):
            return self._recurrence(node)
        if is_op(node, *_NEW):
            return self._by_shape(node)
        if all(self.places.get(n) is None for n in node.all_input_nodes):
            return self._made(node)
        return rule_of(node)(Call(node, self.places, self.batch, self.length))

    def _recurrence(self, node: fx.Node) -> tuple[Place, None]:
        """It returns results, which lie as the first of its arguments does, and a state."""
        arguments = token_arguments(node)
        for source, dim in arguments:
            place = self.places.get(source)
            in_rows = isinstance(place, Rows) and place.batch in (None, Axis(0)) and place.order is None
            if not in_rows or place.tokens != Axis(dim):  # type: ignore[union-attr]
                raise Mixes(f"%{source.name} has no tokens in dimension {dim}")
        return self.places[arguments[0][0]], None

    def _made(self, node: fx.Node) -> Place:
        """A call that reads nothing of any token."""
        if not is_tensor(node) or not any(mentions(size, self.length) for size in shape(node)):
            return None
        if not is_op(node, *_FILLED):
            raise Mixes("it numbers the tokens from the first")
        return self._by_shape(node)

    def _refuse_lengths(self, node: fx.Node) -> None:
        read = [n for n in node.all_input_nodes if _mentions(n.meta.get("val"), self.length)]
        if not read:
            return
        counted = (*_SIZES, "end") if is_op(node, aten.arange) else _SIZES
        for name, argument in named_arguments(node).items():
            inside = [
                n for n in (argument if isinstance(argument, (list, tuple)) else [argument]) if n in read
            ]
            if inside and name not in counted:
                raise _CountsTokens(f"{name} is {value(inside[0])}")

    def _by_shape(self, node: fx.Node) -> Place:
        """Where tokens lie by the sizes alone."""
        if not is_tensor(node):
            return None
        sizes = [expression(size) for size in shape(node)]
        over = [dim for dim, size in enumerate(sizes) if mentions(size, self.length)]
        if not over:
            return None
        (dim, *more) = over
        if more:
            return Several()
        if sizes[dim] == self.length:
            batches = [i for i, size in enumerate(sizes) if size == self.batch and size != 1]
            batch = [i for i in batches if i == dim - 1] or batches
            return Rows(Axis(dim), Axis(batch[0]) if len(batch) == 1 else None)
        inner = sizes[dim] / (self.batch * self.length)
        if not inner.is_integer:
            return Several()
        one = sympy.Integer(1)
        return Rows(Axis(dim, self.batch, inner), Axis(dim, one, self.length * inner))


def numbers_tokens(node: fx.Node, length: sympy.Expr) -> bool:
    """Whether a call counts tokens from the first one, for anything but to turn an order of them round."""
    if not is_op(node, aten.arange) or not any(mentions(size, length) for size in shape(node)):
        return False
    return any(not is_op(user, aten.index_put) for user in node.users)


class _CountsTokens(Exception):
    pass


def _returns_tensors(node: fx.Node) -> bool:
    result = node.meta.get("val")
    first = result[0] if isinstance(result, (list, tuple)) and result else result
    return isinstance(first, torch.Tensor)


def _mentions(size: Any, length: sympy.Expr) -> bool:
    return isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) and mentions(size, length)
