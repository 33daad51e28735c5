"""Rules of lookups and sorts, by which tokens are brought into the order of their experts and back."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from ..graph_edit import aten, is_op, same_size, shape, value
from ..token_rows import Groups, Mixes, Place, Ranks, Rows
from .token_call import Call, Rule
from .value_rules import along, pointwise


def _embedding(call: Call) -> Place:
    call.without_tokens(call.given["weight"])
    return call.rows(call.given["indices"])


def _gathered(call: Call) -> Place:
    """``gather`` and ``scatter``: all tensors have the same dimensions, and each token reads and writes its own."""
    rank = len(shape(call.given["self"]))
    rows = [call.rows(t) for t in call.tensors]
    found = call.aligned(call.tensors, rank)
    if found is None or any(r is None or r.tokens != found.tokens for r in rows):
        raise Mixes("not all of its arguments run over the tokens")
    call.refuse({call.dim(call.given["dim"])}, found)
    for tensor in call.tensors:
        if any(not same_size(shape(tensor)[d], shape(call.given["self"])[d]) for d in found.dims):
            raise Mixes("it reads some of the tokens")
    return found


def _indexed(call: Call) -> Place:
    """A lookup in a constant table, a choice along another dimension, or tokens brought into another order."""
    source, indices = call.given["self"], call.given["indices"]
    at = [place for place, index in enumerate(indices) if index is not None]
    place = call.places.get(indices[at[0]]) if len(at) == 1 else None
    if isinstance(place, Ranks):
        return _brought_into_order(call, source, place, at[0])
    rows = call.rows(source)
    found = [call.rows(indices[i]) for i in at]
    if any(value(indices[i]).dtype is torch.bool for i in at):
        raise Mixes("how many it picks depends on data")
    if rows is not None and any(found):
        raise Mixes("it picks tokens by what others say")
    new = max(len(shape(indices[i])) for i in at)
    front = at[0] if all(b - a == 1 for a, b in pairwise(at)) else 0
    if rows is None:
        picked = call.aligned([indices[i] for i in at], new)
        return picked and picked.moved({dim: dim + front for dim in range(new)})
    call.refuse(set(at), rows)
    kept = [dim for dim in range(len(shape(source))) if dim not in at]
    return rows.moved({dim: i if i < front else i + new for i, dim in enumerate(kept)})


def _brought_into_order(call: Call, source: fx.Node, ranks: Ranks, dim: int) -> Rows:
    """``x[order]``, ``x[order // k]`` of what has one entry where the sorted keys have k, or back."""
    rows, wanted = call.rows(source), ranks.rows
    fine = (
        rows is not None
        and dim == 0 == rows.tokens.dim
        and rows.order is (ranks.order if ranks.inverse else None)
    )
    axes = ("tokens", "batch")
    for mine, theirs in ((getattr(rows, axis), getattr(wanted, axis)) for axis in axes if fine):
        fine = mine and theirs and (mine.outer, mine.inner * ranks.divisor) == (theirs.outer, theirs.inner)
    if not fine:
        raise Mixes("it picks tokens by what others say")
    return replace(wanted, order=None if ranks.inverse else ranks.order)


def _selected_rows(call: Call) -> Place:
    rows = call.rows(call.given["self"])
    call.without_tokens(call.given["index"])
    call.refuse({call.dim(call.given["dim"])}, rows)
    return rows


def _sorted(call: Call) -> Any:
    """Along another dimension each token's own values; all keys of ``[n]``, the start of a product with experts."""
    rows = call.first()
    if rows is None or call.dim(call.given["dim"]) not in rows.dims:
        return rows
    if len(shape(call.tensors[0])) > 1 or rows.order is not None:
        raise Mixes(f"it runs along dimension {rows.tokens.dim}, which counts tokens or rows of the batch")
    return replace(rows, order=call.node), Ranks(rows, call.node)


def _argsorted(call: Call) -> Any:
    places = _sorted(call)
    return places[1] if isinstance(places, tuple) else places


def _divided(call: Call) -> Place:
    """``order // k`` is the token of each sorted entry."""
    place, divisor = call.places.get(call.tensors[0]), call.given["other"]
    if not isinstance(place, Ranks):
        return pointwise(call)
    whole = call.given.get("rounding_mode", "floor") == "floor"
    if not whole or place.inverse or place.divisor != 1 or not isinstance(divisor, int) or divisor <= 0:
        raise Mixes("it computes with how all tokens are sorted")
    return replace(place, divisor=divisor)


def _put(call: Call) -> Place:
    """``x[order] = 0, 1, 2, ...``: the inverse of an order."""
    indices, values = call.given["indices"], call.given["values"]
    place = call.places.get(indices[0]) if len(indices) == 1 else None
    counts = is_op(values, aten.arange) and len(values.args) == 1 and not call.given["accumulate"]
    counts = counts and same_size(shape(values)[0], shape(call.node)[0])
    if isinstance(place, Ranks) and counts and place.divisor == 1 and not place.inverse:
        return replace(place, inverse=True)
    raise Mixes("it writes to places that are computed")


def _histogram(call: Call) -> Place:
    """How many of the sorted keys are 0, 1, ..."""
    keys, bins = _before_copies(call.given["self"]), call.given["bins"]
    place = call.places.get(keys)
    each_its_own = (call.given["min"], call.given["max"]) == (0, bins - 1) and not value(
        keys
    ).is_floating_point()
    if each_its_own and isinstance(place, Rows) and place.order is not None and keys.args == (place.order, 0):
        return Groups(place.order)
    raise Mixes("it counts over all tokens")


def _cumulated(call: Call) -> Place:
    place = call.places.get(call.tensors[0])
    if isinstance(place, Groups) and not place.ends and len(shape(call.node)) == 1:
        return Groups(place.order, ends=True)
    found: Place = along("dim")(call)
    return found


def _grouped_product(call: Call) -> Place:
    """Sorted entries, each times the matrix of its key."""
    entries, matrices, ends, *_ = call.tensors
    rows, groups = call.rows(entries), call.places.get(ends)
    call.without_tokens(matrices)
    fine = isinstance(groups, Groups) and groups.ends and rows is not None and rows.order is groups.order
    if not fine or len(shape(entries)) != 2 or len(call.tensors) != 3:
        raise Mixes("its groups are not those that the tokens are sorted by")
    return rows


def _before_copies(node: Any) -> Any:
    while is_op(node, aten.to, aten._to_copy):
        node = node.args[0]
    return node


ORDERS: dict[Rule, tuple[Any, ...]] = {
    _cumulated: (aten.cumsum,),
    _sorted: (aten.sort,),
    _argsorted: (aten.argsort,),
    _embedding: (aten.embedding,),
    _indexed: (aten.index,),
    _selected_rows: (aten.index_select,),
    _gathered: (aten.gather, aten.scatter, aten.scatter_add, aten.scatter_reduce),
    _divided: (aten.floor_divide, aten.div),
    _put: (aten.index_put,),
    _histogram: (aten.histc,),
}

GROUPED = {"aten::_grouped_mm": _grouped_product, "transformers::grouped_mm_fallback": _grouped_product}
"""Products of sorted entries with one matrix for each key, by their names: one is registered by another library."""
