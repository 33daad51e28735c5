"""Prove that attention masks are plain causal, and drop them.

Before: ``attention(q, k, v, %mask)`` with %mask computed from ``arange <= arange``, and-ed with a
        [B, S] padding input when the decoder was exported with one.
After:  ``attention(q, k, v, None, is_causal=True)``. A padding input is not read any more and is
        named in `ModelGraph.unused_inputs`: the program holds for rows without padding.

The mask is evaluated symbolically: each node becomes a formula over (batch, query, key). A mask
that is not exactly the conjunction of ``key <= query`` and padding is refused, with the first node
that is not understood.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .base_pass import Pass, PassResult, Rejection, refuse
from .canonicalize_attention import Attention, attention_arguments, attentions, change_attention
from .graph_edit import aten, is_op, same_size, shape, value
from .model_graph import ModelGraph

QUERY, KEY, BATCH = -2, -1, -4


@dataclass(frozen=True)
class Index:
    """The coordinate along `axis`, counted from the end, plus `offset`."""

    axis: int
    offset: int = 0


@dataclass(frozen=True)
class Input:
    """Entries of a graph input, its dimensions laid along `axes`."""

    name: str
    axes: tuple[int, ...]


@dataclass(frozen=True)
class KeyAtMostQueryPlus:
    """``key <= query + offset``."""

    offset: int


@dataclass(frozen=True)
class Mask:
    """Conjunction of conditions: a boolean, or (additive) 0 where it holds and very negative elsewhere."""

    conditions: frozenset[Any]
    additive: bool = False


class _NotUnderstood(Exception):
    pass


Formula = Index | Input | Mask
CAUSAL = KeyAtMostQueryPlus(0)


class ProveCausal(Pass):
    """Args:
    padding: names of the inputs ``[B, S]`` that say which tokens are no padding. Another input that a mask is and-ed
        with is refused: it may forbid more.
    """

    requires = ("canonical attention",)
    provides = ("causal attention",)

    def __init__(self, padding: Sequence[str] = ("attention_mask",)) -> None:
        self.padding = frozenset(padding)

    def apply(self, graph: ModelGraph) -> PassResult:
        proved, rejected, dropped = [], [], 0
        padding: set[str] = set()
        for node in list(attentions(graph)):
            given = attention_arguments(node)
            if given.mask is None and given.is_causal:
                proved.append(node)
                continue
            try:
                padding |= _prove(given, self.padding)
            except _NotUnderstood as reason:
                rejected.append(Rejection(node.name, str(reason)))
                continue
            change_attention(node, mask=None, is_causal=True)
            proved.append(node)
            dropped += 1
        if rejected:
            raise refuse(
                f"{len(proved)} attention masks are plain causal, {len(rejected)} are not",
                "key <= query, possibly and-ed with a [B, S] padding input",
                tuple(rejected),
            )
        for name in sorted(padding):
            _read_sizes_elsewhere(graph, name)
        graph.clean_up()
        graph.unused_inputs += tuple(n.name for n in graph.inputs if n.name in padding and not n.users)
        detail = f"valid without padding: {', '.join(sorted(padding))} dropped" if padding else ""
        return PassResult(self.name, matched=len(proved), rewritten=dropped, detail=detail)


def _read_sizes_elsewhere(graph: ModelGraph, name: str) -> None:
    """Let nodes that only want the batch or the length read it from another input."""
    dropped = next(n for n in graph.inputs if n.name == name)
    for user in [u for u in dropped.users if is_op(u, aten.sym_size)]:
        for other in graph.inputs:
            dims = [i for i, size in enumerate(shape(other)) if same_size(size, value(user))]
            if other is not dropped and dims:
                user.args = (other, dims[0])
                break


def _prove(given: Attention, known: frozenset[str]) -> set[str]:
    """Names of the padding inputs of a causal mask; `_NotUnderstood` for any other mask."""
    mask = given.mask
    if mask is None:
        raise _NotUnderstood("it has no mask and is not causal: every row sees every row")
    if given.is_causal:
        raise _NotUnderstood("it has a mask and is_causal together")
    formula = _evaluate(mask, {})
    if not isinstance(formula, Mask) or formula.additive is (value(mask).dtype is torch.bool):
        raise _NotUnderstood(f"its mask %{mask.name} is {formula}, not a condition on query and key")
    rows, columns = shape(given.query)[2], shape(given.key)[2]
    if not (same_size(shape(mask)[-2], rows) and same_size(shape(mask)[-1], columns)):
        raise _NotUnderstood(
            f"its mask %{mask.name} has shape {list(shape(mask))}, not [..., {rows}, {columns}]"
        )
    padding = {c for c in formula.conditions if isinstance(c, Input) and c.axes == (BATCH, KEY)}
    rest = formula.conditions - padding
    others = sorted({c.name for c in padding} - known)
    if others:
        raise _NotUnderstood(
            f"its mask %{mask.name} is and-ed with the input {others[0]!r}, which is no padding mask; those are "
            f"{sorted(known)}"
        )
    if not any(isinstance(c, KeyAtMostQueryPlus) and c.offset <= 0 for c in rest):
        raise _NotUnderstood(f"its mask %{mask.name} does not imply key <= query")
    if rest != {CAUSAL}:
        raise _NotUnderstood(f"its mask %{mask.name} also demands {sorted(map(str, rest - {CAUSAL}))}")
    return {c.name for c in padding}


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
            return rule(node, lambda argument: _evaluate(argument, known))
    raise _NotUnderstood(f"its mask depends on %{node.name} ({node.target}), which is not understood")


Evaluate = Callable[[fx.Node], Formula]


def _arange(node: fx.Node, _: Evaluate) -> Formula:
    numbers = [a for a in node.args if isinstance(a, (int, fx.Node))]
    if is_op(node, aten.arange.default) or (is_op(node, aten.arange.start) and numbers[0] == 0):
        return Index(-1)
    raise _NotUnderstood(f"%{node.name} does not count from 0 in steps of 1")


def _add(node: fx.Node, evaluate: Evaluate) -> Formula:
    source, amount = node.args[:2]
    formula = evaluate(source)  # type: ignore[arg-type]
    if isinstance(formula, Index) and isinstance(amount, int):
        sign = -1 if is_op(node, aten.sub) else 1
        return Index(formula.axis, formula.offset + sign * amount)
    raise _NotUnderstood(f"%{node.name} adds something other than a constant to an index")


def _unsqueeze(node: fx.Node, evaluate: Evaluate) -> Formula:
    rank = len(shape(node))
    inserted = node.args[1] % rank - rank  # type: ignore[operator]
    return _relabel(evaluate(node.args[0]), lambda axis: axis - 1 if axis <= inserted else axis)  # type: ignore[arg-type]


def _relabel(formula: Formula, new_axis: Callable[[int], int]) -> Formula:
    if isinstance(formula, Index):
        return Index(new_axis(formula.axis), formula.offset)
    if isinstance(formula, Input):
        return Input(formula.name, tuple(map(new_axis, formula.axes)))
    stays = (new_axis(QUERY), new_axis(KEY)) == (QUERY, KEY)
    if not stays and any(not isinstance(c, Input) for c in formula.conditions):
        raise _NotUnderstood("a condition on query and key is moved to other dimensions")
    moved = (_relabel(c, new_axis) if isinstance(c, Input) else c for c in formula.conditions)
    return Mask(frozenset(moved), formula.additive)


def _same(node: fx.Node, evaluate: Evaluate) -> Formula:
    """Broadcasting and dtype changes keep the formula; a bool of an input is still that input."""
    formula, source = evaluate(node.args[0]), value(node.args[0])  # type: ignore[arg-type]
    if isinstance(formula, Mask) and (source.dtype is torch.bool) != (value(node).dtype is torch.bool):
        raise _NotUnderstood(f"%{node.name} casts a mask from {source.dtype} to {value(node).dtype}")
    if isinstance(formula, Index) and not same_size(source.shape[formula.axis], shape(node)[formula.axis]):
        raise _NotUnderstood(f"%{node.name} spreads one place over a dimension")
    return formula


def _at_most(node: fx.Node, evaluate: Evaluate) -> Formula:
    left, right = (evaluate(a) if isinstance(a, fx.Node) else a for a in node.args[:2])
    strict = is_op(node, aten.lt, aten.gt)
    if is_op(node, aten.ge, aten.gt):
        left, right = right, left
    keys, queries = node.args[:2] if not is_op(node, aten.ge, aten.gt) else node.args[1::-1]
    if (
        isinstance(left, Index)
        and isinstance(right, Index)
        and (left.axis, right.axis) == (KEY, QUERY)
        and same_size(shape(keys)[KEY], shape(queries)[QUERY])
    ):
        return Mask(frozenset({KeyAtMostQueryPlus(right.offset - left.offset - strict)}))
    raise _NotUnderstood(f"%{node.name} compares {left} with {right}, not key with query")


def _true(node: fx.Node, _: Evaluate) -> Formula:
    if is_op(node, aten.full) and node.args[1] is not True:
        raise _NotUnderstood(f"%{node.name} is not constantly true")
    if value(node).dtype is not torch.bool:
        raise _NotUnderstood(f"%{node.name} is a constant of dtype {value(node).dtype}")
    return Mask(frozenset())


def _and(node: fx.Node, evaluate: Evaluate) -> Formula:
    conditions: frozenset[Any] = frozenset()
    for argument in node.args[:2]:
        formula = evaluate(argument)  # type: ignore[arg-type]
        if value(argument).dtype is not torch.bool:
            raise _NotUnderstood(f"%{node.name} combines bits of {value(argument).dtype}")
        conditions |= formula.conditions if isinstance(formula, Mask) else {formula}
    return Mask(conditions)


def _index(node: fx.Node, evaluate: Evaluate) -> Formula:
    """``padding[batch index, key index]``."""
    source, indices = node.args
    formula, coordinates = evaluate(source), [evaluate(i) for i in indices]  # type: ignore[arg-type, union-attr]
    plain = all(
        isinstance(c, Index) and c.offset == 0 and same_size(shape(i)[c.axis], size)
        for c, i, size in zip(coordinates, indices, shape(source), strict=False)  # type: ignore[arg-type]
    )
    if isinstance(formula, Input) and plain and len(coordinates) == len(formula.axes) == len(shape(source)):  # type: ignore[arg-type]
        return Input(formula.name, tuple(c.axis for c in coordinates))  # type: ignore[union-attr]
    raise _NotUnderstood(f"%{node.name} gathers from a computed tensor")


def _where(node: fx.Node, evaluate: Evaluate) -> Formula:
    """Additive masks: 0 where the condition holds, a huge negative number elsewhere."""
    condition, allowed, forbidden = node.args
    if _constant(allowed) == 0 and _constant(forbidden, default=0.0) <= -1e4:
        formula = evaluate(condition)  # type: ignore[arg-type]
        conditions = formula.conditions if isinstance(formula, Mask) else frozenset({formula})
        if value(condition).dtype is torch.bool:
            return Mask(conditions, additive=True)
    raise _NotUnderstood(f"%{node.name} is no choice between 0 and a huge negative number")


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
