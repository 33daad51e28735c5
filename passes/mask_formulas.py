"""What a mask says, as a formula over (batch, query, key), read off the nodes that compute it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from .graph_edit import aten, is_op, named_arguments, same_size, shape, value

QUERY, KEY, BATCH = -2, -1, -4
_WIDE = (torch.int64, torch.int32)
"""Dtypes in which places are counted."""


@dataclass(frozen=True)
class Index:
    """The coordinate along `axis`, counted from the end, plus `offset`.

    With `behind` less the places in front of a row's first token, by the input of that name.
    """

    axis: int
    offset: int = 0
    behind: str = ""


@dataclass(frozen=True)
class Input:
    """Entries of a graph input, its dimensions laid along `axes`."""

    name: str
    axes: tuple[int, ...]


@dataclass(frozen=True)
class Count:
    """How many entries of an input are set up to each place, or, once `is_zero` is told, whether none is."""

    name: str
    axes: tuple[int, ...]
    is_zero: bool = False


@dataclass(frozen=True)
class InFront:
    """How many places a row of an input has in front of the first entry that is set."""

    name: str
    axes: tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """The number of the chunk of `size` places that an index is in."""

    index: Index
    size: int


@dataclass(frozen=True)
class SameChunk:
    """``key // size == query // size``, counted from the first token by the input `behind`."""

    size: int
    behind: str


@dataclass(frozen=True)
class KeyAtMostQueryPlus:
    """``key <= query + offset``."""

    offset: int


@dataclass(frozen=True)
class KeyAtLeastQueryPlus:
    """``key >= query + offset``."""

    offset: int


@dataclass(frozen=True)
class Mask:
    """Conjunction of conditions: a boolean, or (additive) 0 where it holds and very negative elsewhere."""

    conditions: frozenset[Any]
    additive: bool = False


class NotUnderstood(Exception):
    """Why a mask has no formula."""


Formula = Index | Input | Count | InFront | Chunk | Mask


def evaluate(node: fx.Node) -> Formula:
    """The formula of what a node computes.

    Raises:
        NotUnderstood: it depends on a node that no rule knows.
    """
    return _evaluate(node, {})


def _evaluate(node: fx.Node, known: dict[fx.Node, Formula]) -> Formula:
    if node not in known:
        known[node] = _evaluate_once(node, known)
    return known[node]


def _evaluate_once(node: fx.Node, known: dict[fx.Node, Formula]) -> Formula:
    if node.op == "placeholder":
        rank = len(shape(node))
        return Input(node.name, tuple(range(-rank, 0)))
    for packet, rule in _RULES.items():
        if is_op(node, packet):
            formula = rule(node, lambda argument: _evaluate(argument, known))
            if isinstance(formula, (Index, InFront, Chunk)) and value(node).dtype not in _WIDE:
                raise NotUnderstood(
                    f"%{node.name} counts in {value(node).dtype}, which holds few whole numbers"
                )
            return formula
    raise NotUnderstood(f"its mask depends on %{node.name} ({node.target}), which is not understood")


Evaluate = Callable[[fx.Node], Formula]


def _arange(node: fx.Node, _: Evaluate) -> Formula:
    numbers = [a for a in node.args if isinstance(a, (int, fx.Node))]
    if is_op(node, aten.arange.default) or (is_op(node, aten.arange.start) and numbers[0] == 0):
        return Index(-1)
    raise NotUnderstood(f"%{node.name} does not count from 0 in steps of 1")


def _add(node: fx.Node, evaluate: Evaluate) -> Formula:
    source, amount = node.args[:2]
    formula = evaluate(source)  # type: ignore[arg-type]
    if isinstance(formula, Index) and isinstance(amount, int):
        sign = -1 if is_op(node, aten.sub) else 1
        return replace(formula, offset=formula.offset + sign * amount)
    if isinstance(formula, Index) and not formula.behind and is_op(node, aten.sub):
        front = evaluate(amount)  # type: ignore[arg-type]
        if isinstance(front, InFront) and front.axes == (BATCH,):
            return replace(formula, behind=front.name)
    raise NotUnderstood(f"%{node.name} adds something other than a constant to an index")


def _unsqueeze(node: fx.Node, evaluate: Evaluate) -> Formula:
    rank = len(shape(node))
    inserted = node.args[1] % rank - rank  # type: ignore[operator]
    return _relabel(evaluate(node.args[0]), lambda axis: axis - 1 if axis <= inserted else axis)  # type: ignore[arg-type]


def _relabel(formula: Formula, new_axis: Callable[[int], int]) -> Formula:
    if isinstance(formula, Index):
        return replace(formula, axis=new_axis(formula.axis))
    if isinstance(formula, Chunk):
        return Chunk(replace(formula.index, axis=new_axis(formula.index.axis)), formula.size)
    if isinstance(formula, (Input, Count, InFront)):
        return replace(formula, axes=tuple(map(new_axis, formula.axes)))
    stays = (new_axis(QUERY), new_axis(KEY)) == (QUERY, KEY)
    if not stays and any(not isinstance(c, Input) for c in formula.conditions):
        raise NotUnderstood("a condition on query and key is moved to other dimensions")
    moved = (_relabel(c, new_axis) if isinstance(c, Input) else c for c in formula.conditions)
    return Mask(frozenset(moved), formula.additive)


def _same(node: fx.Node, evaluate: Evaluate) -> Formula:
    """Broadcasting and dtype changes keep the formula; a bool of an input is still that input."""
    formula, source = evaluate(node.args[0]), value(node.args[0])  # type: ignore[arg-type]
    if isinstance(formula, Mask) and (source.dtype is torch.bool) != (value(node).dtype is torch.bool):
        raise NotUnderstood(f"%{node.name} casts a mask from {source.dtype} to {value(node).dtype}")
    index = formula.index if isinstance(formula, Chunk) else formula
    if isinstance(index, Index) and not same_size(source.shape[index.axis], shape(node)[index.axis]):
        raise NotUnderstood(f"%{node.name} spreads one place over a dimension")
    return formula


def _at_most(node: fx.Node, evaluate: Evaluate) -> Formula:
    """``left <= right`` over all keys and queries; one less if it has to be strictly less."""
    low, high = node.args[:2] if not is_op(node, aten.ge, aten.gt) else node.args[1::-1]
    left, right = (evaluate(a) if isinstance(a, fx.Node) else a for a in (low, high))
    strict = is_op(node, aten.lt, aten.gt)
    if (
        isinstance(left, Index)
        and isinstance(right, Index)
        and left.behind == right.behind
        and _run_over_all(low, left, high, right)
    ):
        if (left.axis, right.axis) == (KEY, QUERY):
            return Mask(frozenset({KeyAtMostQueryPlus(right.offset - left.offset - strict)}))
        return Mask(frozenset({KeyAtLeastQueryPlus(left.offset - right.offset + strict)}))
    raise NotUnderstood(f"%{node.name} compares {left} with {right}, not key with query")


def _run_over_all(low: Any, left: Index, high: Any, right: Index) -> bool:
    """Whether one index is that of keys and the other that of as many queries."""
    sizes = shape(low)[left.axis], shape(high)[right.axis]
    return {left.axis, right.axis} == {KEY, QUERY} and same_size(*sizes)


def _count(node: fx.Node, evaluate: Evaluate) -> Formula:
    """How many tokens there are up to each place."""
    source, dim = node.args[:2]
    formula = evaluate(source)  # type: ignore[arg-type]
    along_tokens = (
        dim in (-1, len(shape(source)) - 1) and isinstance(formula, Input) and formula.axes[-1] == -1
    )
    if isinstance(formula, Input) and along_tokens and value(source).dtype is torch.bool:
        return Count(formula.name, formula.axes)
    raise NotUnderstood(f"%{node.name} adds up something other than a padding mask along its tokens")


def _sum(node: fx.Node, evaluate: Evaluate) -> Formula:
    """How many places come before the first token."""
    given = named_arguments(node)
    formula = evaluate(given["self"])
    along_tokens = list(given.get("dim") or ()) in ([-1], [len(shape(given["self"])) - 1])
    if isinstance(formula, Count) and formula.is_zero and along_tokens and not given.get("keepdim"):
        return InFront(formula.name, tuple(axis + 1 for axis in formula.axes[:-1]))
    raise NotUnderstood(f"%{node.name} adds up something other than the places in front of the first token")


def _chunk(node: fx.Node, evaluate: Evaluate) -> Formula:
    source, size = node.args[:2]
    formula = evaluate(source)  # type: ignore[arg-type]
    if isinstance(formula, Index) and isinstance(size, int) and size > 0:
        return Chunk(formula, size)
    raise NotUnderstood(f"%{node.name} divides something other than an index by a number")


def _equal(node: fx.Node, evaluate: Evaluate) -> Formula:
    """``count == 0``, or whether key and query are in one chunk."""
    first, second = node.args[:2]
    left = evaluate(first)  # type: ignore[arg-type]
    if isinstance(left, Count) and not left.is_zero and (second == 0 or is_op(second, aten.zeros_like)):
        return replace(left, is_zero=True)
    right = evaluate(second) if isinstance(second, fx.Node) else second
    if isinstance(left, Chunk) and isinstance(right, Chunk):
        alike = (left.size, left.index.behind, 0) == (right.size, right.index.behind, left.index.offset)
        if alike and right.index.offset == 0 and _run_over_all(first, left.index, second, right.index):
            return Mask(frozenset({SameChunk(left.size, left.index.behind)}))
    raise NotUnderstood(f"%{node.name} compares {left} with {right}, not the chunks of key and query")


def _true(node: fx.Node, _: Evaluate) -> Formula:
    if is_op(node, aten.full) and node.args[1] is not True:
        raise NotUnderstood(f"%{node.name} is not constantly true")
    if value(node).dtype is not torch.bool:
        raise NotUnderstood(f"%{node.name} is a constant of dtype {value(node).dtype}")
    return Mask(frozenset())


def _and(node: fx.Node, evaluate: Evaluate) -> Formula:
    conditions: frozenset[Any] = frozenset()
    for argument in node.args[:2]:
        formula = evaluate(argument)  # type: ignore[arg-type]
        if value(argument).dtype is not torch.bool:
            raise NotUnderstood(f"%{node.name} combines bits of {value(argument).dtype}")
        conditions |= formula.conditions if isinstance(formula, Mask) else {formula}
    return Mask(conditions)


def _index(node: fx.Node, evaluate: Evaluate) -> Formula:
    """``padding[batch index, key index]``."""
    source, indices = node.args
    formula, coordinates = evaluate(source), [evaluate(i) for i in indices]  # type: ignore[arg-type, union-attr]
    plain = all(
        isinstance(c, Index) and c.offset == 0 and not c.behind and same_size(shape(i)[c.axis], size)
        for c, i, size in zip(coordinates, indices, shape(source), strict=False)  # type: ignore[arg-type]
    )
    if (
        isinstance(formula, (Input, InFront))
        and plain
        and len(coordinates) == len(formula.axes) == len(shape(source))
    ):  # type: ignore[arg-type]
        return replace(formula, axes=tuple(c.axis for c in coordinates))  # type: ignore[union-attr]
    raise NotUnderstood(f"%{node.name} gathers from a computed tensor")


def _where(node: fx.Node, evaluate: Evaluate) -> Formula:
    """Additive masks: 0 where the condition holds, a huge negative number elsewhere."""
    condition, allowed, forbidden = node.args
    if _constant(allowed) == 0 and _constant(forbidden, default=0.0) <= -1e4:
        formula = evaluate(condition)  # type: ignore[arg-type]
        conditions = formula.conditions if isinstance(formula, Mask) else frozenset({formula})
        if value(condition).dtype is torch.bool:
            return Mask(conditions, additive=True)
    raise NotUnderstood(f"%{node.name} is no choice between 0 and a huge negative number")


def _constant(argument: Any, default: float = float("nan")) -> float:
    if isinstance(argument, (int, float)):
        return float(argument)
    if is_op(argument, aten.scalar_tensor):
        return float(argument.args[0])
    if is_op(argument, aten.full):
        return float(argument.args[1])
    return default


_RULES: dict[Any, Callable[[fx.Node, Evaluate], Formula]] = {
    aten.arange: _arange,
    aten.add: _add,
    aten.sub: _add,
    aten.unsqueeze: _unsqueeze,
    aten.expand: _same,
    aten.to: _same,
    aten._to_copy: _same,
    aten.contiguous: _same,
    aten.clone: _same,
    aten.cumsum: _count,
    aten.sum: _sum,
    aten.floor_divide: _chunk,
    aten.eq: _equal,
    aten.le: _at_most,
    aten.lt: _at_most,
    aten.ge: _at_most,
    aten.gt: _at_most,
    aten.new_ones: _true,
    aten.ones: _true,
    aten.full: _true,
    aten.logical_and: _and,
    aten.bitwise_and: _and,
    aten.__and__: _and,
    aten.index: _index,
    aten.where: _where,
}
