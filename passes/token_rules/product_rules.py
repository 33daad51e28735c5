"""Rules of products, which treat the rows of a matrix alone and sum over its columns."""

from typing import Any

from torch import fx

from ..graph_edit import aten, shape
from ..token_rows import Mixes, Place, Rows, agreed
from .token_call import Call, Rule


def _linear(call: Call) -> Place:
    for name in ("weight", "bias"):
        call.without_tokens(call.given[name])
    rows = call.rows(call.given["input"])
    call.refuse({len(shape(call.given["input"])) - 1}, rows)
    return rows


def _product(first: str, second: str, bias: str | None = None) -> Rule:
    def rule(call: Call) -> Place:
        found = _matmul(call, call.given[first], call.given[second])
        if bias is None:
            return found
        return agreed(found, call.aligned([call.given[bias]], len(shape(call.node))))

    return rule


def _matmul(call: Call, left: fx.Node, right: fx.Node) -> Rows | None:
    """Rows of the left, columns of the right, and dimensions of the batch of products are treated alone."""
    rank = len(shape(call.node))
    sides = []
    for tensor, contracted, absent in (
        (left, -1, len(shape(right)) == 1),
        (right, -2, len(shape(left)) == 1),
    ):
        rows, own = call.rows(tensor), len(shape(tensor))
        if rows is not None:
            call.refuse({own + max(contracted, -own)}, rows)
            # What is multiplied by a vector loses a dimension.
            kept = [dim - own for dim in range(own) if dim != own + contracted] if absent else range(-own, 0)
            places = {dim + own: new for dim, new in zip(kept, range(rank - len(kept), rank), strict=True)}
            rows = rows.moved(places)
        sides.append(rows)
    if sides[0] and sides[1] and (sides[0].dims | sides[1].dims) & {rank - 1, rank - 2}:
        raise Mixes("it multiplies tokens by tokens")
    return agreed(*sides)


def _einsum(call: Call) -> Place:
    tensors, equation = call.given["tensors"], call.given["equation"].replace(" ", "")
    terms, arrow, result = equation.partition("->")
    letters = terms.split(",")
    if not arrow or "." in equation:
        letters, result = _spelled_out(letters, result, [len(shape(t)) for t in tensors], bool(arrow))
    found = None
    for tensor, term in zip(tensors, letters, strict=True):
        rows = call.rows(tensor)
        if rows is None:
            continue
        if any(term.count(term[dim]) > 1 or term[dim] not in result for dim in rows.dims):
            raise Mixes(f"{equation} sums over tokens or rows of the batch")
        found = agreed(found, rows.moved({dim: result.find(letter) for dim, letter in enumerate(term)}))
    return found


def _spelled_out(terms: list[str], result: str, ranks: list[int], has_result: bool) -> tuple[list[str], str]:
    """The terms of an einsum with letters for an ellipsis, which stands for the dimensions before the others."""
    if not has_result:
        raise Mixes("an einsum without a result is not followed")
    widths = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    widest = "0123456789"[: max(widths)]
    spelled = [term.replace("...", widest[len(widest) - w :]) for term, w in zip(terms, widths, strict=True)]
    return spelled, result.replace("...", widest)


PRODUCTS: dict[Rule, tuple[Any, ...]] = {
    _linear: (aten.linear,),
    _product("self", "other"): (aten.matmul,),
    _product("self", "mat2"): (aten.mm, aten.bmm),
    _product("mat1", "mat2", "self"): (aten.addmm,),
    _product("batch1", "batch2", "self"): (aten.baddbmm,),
    _einsum: (aten.einsum,),
}
