"""How the tokens lie in what an operator returns, for those that compute each token from that token alone.

A rule is given the call and returns the place of the tokens, or raises `Mixes`. An operator without a rule mixes.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import sympy
import torch
from torch import fx

from .graph_edit import aten, expression, is_op, is_tensor, named_arguments, same_size, shape, value
from .token_rows import Groups, Mixes, Place, Ranks, Rows, Several, agreed, reshaped


class Call:
    """A call and where the tokens lie in its arguments.

    Attributes:
        node: the call.
        given: its arguments by name.
        places: of all nodes before it.
        batch: rows of the batch, B.
        length: tokens of a row, S.
    """

    def __init__(
        self, node: fx.Node, places: dict[fx.Node, Any], batch: sympy.Expr, length: sympy.Expr
    ) -> None:
        self.node, self.places = node, places
        self.given = named_arguments(node)
        self.batch, self.length = batch, length

    @property
    def tensors(self) -> list[fx.Node]:
        return [n for n in self.node.all_input_nodes if is_tensor(n)]

    def rows(self, tensor: Any) -> Rows | None:
        """Where tokens lie in an argument."""
        place = self.places.get(tensor) if isinstance(tensor, fx.Node) else None
        if isinstance(place, Several):
            raise Mixes(f"%{tensor.name} relates tokens to each other")
        if isinstance(place, (Ranks, Groups)):
            raise Mixes(f"%{tensor.name} depends on how all tokens are sorted")
        return place

    def first(self) -> Rows | None:
        """Where tokens lie in the first argument, the only one that may have any."""
        source, *others = self.tensors
        for other in others:
            self.without_tokens(other)
        return self.rows(source)

    def without_tokens(self, tensor: Any) -> None:
        if self.rows(tensor) is not None:
            raise Mixes(f"%{tensor.name} is no constant but computed from tokens")

    def dim(self, dim: int, rank: int | None = None) -> int:
        """A dimension counted from the first."""
        return dim % max(1, rank if rank is not None else len(shape(self.tensors[0])))

    def refuse(self, dims: set[int], rows: Rows | None) -> None:
        """Refuse to run along dimensions that count tokens or the batch."""
        if rows is not None and dims & rows.dims:
            raise Mixes(
                f"it runs along dimension {min(dims & rows.dims)}, which counts tokens or rows of the batch"
            )


Rule = Callable[[Call], Any]


def rule_of(node: fx.Node) -> Rule:
    """The rule for an operator."""
    target = node.target
    tags = getattr(target, "tags", ())
    rule = _RULES.get(getattr(target, "overloadpacket", target)) or _GROUPED.get(_schema_name(target))
    if rule is not None:
        return rule
    if torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags:
        return _pointwise
    raise Mixes("no rule says that it treats each token alone")


def _schema_name(target: Any) -> str:
    return target._schema.name if isinstance(target, torch._ops.OpOverload) else ""


def _pointwise(call: Call) -> Place:
    rank = len(shape(call.node))
    return _aligned(call, call.tensors, rank)


def _chosen(call: Call) -> Place:
    if "self" not in call.given:
        raise Mixes("how many places it finds depends on data")
    return _pointwise(call)


def _one_hot(call: Call) -> Place:
    if call.given["num_classes"] < 0:
        raise Mixes("its size depends on the largest value")
    return call.first()


def _aligned(call: Call, tensors: list[fx.Node], rank: int) -> Rows | None:
    """Of tensors that are broadcast to `rank` dimensions."""
    found = None
    for tensor in tensors:
        rows, own = call.rows(tensor), len(shape(tensor))
        if rows is not None and own != rank:
            rows = rows.moved({dim: dim + rank - own for dim in range(own)})
        found = agreed(found, rows)
    return found


def _copied(call: Call) -> Place:
    """The same values in another dtype or memory."""
    place = call.places.get(call.tensors[0])
    return place if isinstance(place, (Ranks, Groups)) else call.first()


def _as_another(call: Call) -> Place:
    """As `_copied`, in the dtype of another tensor."""
    return call.rows(call.tensors[0])


def _filled_like(call: Call) -> Place:
    place = call.places.get(call.tensors[0])
    return place.rows if isinstance(place, Ranks) else call.first()


def _view(call: Call) -> Place:
    """The same elements in the same order, under other sizes."""
    rows = call.first()
    if rows is None:
        return None
    before, after = (tuple(map(expression, shape(n))) for n in (call.tensors[0], call.node))
    tokens = reshaped(rows.tokens, call.length, before, after)
    batch = rows.batch and reshaped(rows.batch, call.batch, before, after)
    if tokens is None or (rows.batch is not None and batch is None):
        raise Mixes(f"{[*before]} as {[*after]} tears the tokens apart")
    if rows.order is not None and (tokens != rows.tokens or before[0] != after[0]):
        raise Mixes("it counts sorted tokens by their old place")
    return Rows(tokens, batch, rows.order)


def _typed_view(call: Call) -> Place:
    if isinstance(call.given.get("dtype"), torch.dtype):
        raise Mixes("it reads bits as another dtype")
    return _view(call)


def _permuted(order: Callable[[Call, int], list[int]]) -> Rule:
    """`order` gives for each new dimension the old one."""

    def rule(call: Call) -> Place:
        rows, rank = call.first(), len(shape(call.node))
        return rows and rows.moved({old: new for new, old in enumerate(order(call, rank))})

    return rule


def _swapped(call: Call, rank: int) -> list[int]:
    names = ("dim0", "dim1") if "dim0" in call.given else ("axis0", "axis1")
    first, second = (call.dim(call.given[name], rank) for name in names)
    dims = list(range(rank))
    dims[first], dims[second] = second, first
    return dims


def _expanded(call: Call) -> Place:
    """Dimensions are repeated as a whole; the one of the tokens is not."""
    source = call.tensors[0]
    rows, own, rank = call.rows(source), len(shape(source)), len(shape(call.node))
    if rows is None:
        return None
    moved = rows.moved({dim: dim + rank - own for dim in range(own)})
    for dim, size in enumerate(shape(call.node)):
        old = shape(source)[dim - rank + own] if dim >= rank - own else 1
        mentioned = expression(size).free_symbols & call.length.free_symbols
        if (dim in moved.dims or mentioned) and not same_size(old, size):
            raise Mixes("it repeats the tokens")
    return moved


def _repeated_inside(call: Call) -> Place:
    """``repeat_interleave(x, n, dim)``: each entry n times, next to each other."""
    rows, dim, times = call.first(), call.given.get("dim"), call.given["repeats"]
    if rows is None:
        return None
    if dim is None or not isinstance(times, int) or rows.order is not None:
        raise Mixes("it repeats the tokens")
    place = call.dim(dim)
    tokens, batch = (
        axis and (replace(axis, inner=axis.inner * times) if axis.dim == place else axis)
        for axis in (rows.tokens, rows.batch)
    )
    return Rows(tokens, batch)  # type: ignore[arg-type]


def _along(*names: str, drops: bool = False) -> Rule:
    """An operator that runs along the dimensions that arguments name; with `drops` the result lacks them."""

    def rule(call: Call) -> Place:
        rows, rank = call.first(), len(shape(call.tensors[0]))
        dims: set[int] = set()
        for name in (name for name in names if name in call.given):
            given = call.given[name]
            listed = given if isinstance(given, (list, tuple)) else [given]
            dims |= {call.dim(dim) for dim in listed} if given is not None else set(range(rank))
        if not dims:
            dims = set(range(rank))
        call.refuse(dims, rows)
        if rows is None or not drops or call.given.get("keepdim", False):
            return rows
        kept = [dim for dim in range(rank) if dim not in dims]
        return rows.moved({old: new for new, old in enumerate(kept)})

    return rule


def _last_dims(count: Callable[[Call], int]) -> Rule:
    """An operator that runs along the last dimensions; its other arguments are constants."""

    def rule(call: Call) -> Place:
        rows, rank = call.first(), len(shape(call.tensors[0]))
        call.refuse(set(range(rank - count(call), rank)), rows)
        return rows

    return rule


def _joined(call: Call) -> Place:
    tensors = [tensor for tensor in call.given["tensors"] if is_tensor(tensor)]
    rows = _aligned(call, tensors, len(shape(tensors[0])))
    call.refuse({call.dim(call.given["dim"])}, rows)
    return rows


def _stacked(call: Call) -> Place:
    tensors, rank = call.given["tensors"], len(shape(call.node))
    rows, new = _aligned(call, tensors, rank - 1), call.dim(call.given["dim"], rank)
    return rows and rows.moved({dim: dim + (dim >= new) for dim in range(rank - 1)})


def _padded(call: Call) -> Place:
    rows, rank = call.first(), len(shape(call.node))
    pairs = list(zip(call.given["pad"][::2], call.given["pad"][1::2], strict=True))
    call.refuse({rank - 1 - place for place, pair in enumerate(pairs) if pair != (0, 0)}, rows)
    return rows


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
        return agreed(found, _aligned(call, [call.given[bias]], len(shape(call.node))))

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


def _embedding(call: Call) -> Place:
    call.without_tokens(call.given["weight"])
    return call.rows(call.given["indices"])


def _gathered(call: Call) -> Place:
    """``gather`` and ``scatter``: all tensors have the same dimensions, and each token reads and writes its own."""
    rank = len(shape(call.given["self"]))
    rows = [call.rows(t) for t in call.tensors]
    found = _aligned(call, call.tensors, rank)
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
        picked = _aligned(call, [indices[i] for i in at], new)
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


def _written_into(call: Call) -> Place:
    """A part of a tensor along one dimension, or one entry of it, replaced."""
    whole, part = call.rows(call.given["self"]), call.rows(call.given["src"])
    sizes, rank = shape(call.given["src"]), len(shape(call.node))
    dim = call.dim(call.given["dim"], rank)
    if len(sizes) < rank:
        part = part and part.moved({d: d + (d >= dim) for d in range(rank - 1)})
    elif same_size(sizes[dim], shape(call.node)[dim]):
        return part
    call.refuse({dim}, whole)
    call.refuse({dim}, part)
    return agreed(whole, part)


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
        return _pointwise(call)
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
    along: Place = _along("dim")(call)
    return along


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


def _channel_groups(call: Call) -> Place:
    """Normalisation over all but the first dimension."""
    rows = call.first()
    call.refuse(set(range(1, len(shape(call.node)))), rows)
    return rows


def _complex(change: int) -> Rule:
    def rule(call: Call) -> Place:
        rows, rank = call.first(), len(shape(call.tensors[0]))
        return rows and rows.moved({dim: dim for dim in range(rank + min(change, 0))})

    return rule


def _select(call: Call) -> Place:
    rows, rank = call.first(), len(shape(call.tensors[0]))
    dim = call.dim(call.given["dim"])
    return rows and rows.moved({d: d - (d > dim) for d in range(rank) if d != dim})


def _transposed(call: Call, rank: int) -> list[int]:
    return [*range(rank - 2), rank - 1, rank - 2]


def _compared(call: Call) -> Place:
    """``max`` and ``min`` of two tensors, or along a dimension."""
    return _pointwise(call) if "other" in call.given else _along("dim", drops=True)(call)


def _width(call: Call) -> int:
    return len(call.given["normalized_shape"])


_BY_RULE: dict[Rule, tuple[Any, ...]] = {
    _pointwise: (aten.__and__, aten.__or__, aten.__xor__, aten.masked_fill, aten.polar, aten.copy, aten.fill),
    _copied: (
        aten.to,
        aten._to_copy,
        aten.contiguous,
        aten.clone,
        aten.alias,
        aten.detach,
        aten.lift_fresh_copy,
    ),
    _as_another: (aten.type_as,),
    _filled_like: (aten.empty_like, aten.zeros_like, aten.ones_like, aten.full_like),
    _chosen: (aten.where,),
    _one_hot: (aten.one_hot,),
    _view: (aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze),
    _typed_view: (aten.view,),
    _permuted(_swapped): (aten.transpose, aten.swapaxes, aten.swapdims),
    _permuted(_transposed): (aten.mT, aten.adjoint),
    _permuted(lambda _, rank: list(reversed(range(rank)))): (aten.t, aten.numpy_T),
    _permuted(lambda call, rank: [call.dim(d, rank) for d in call.given["dims"]]): (aten.permute,),
    _expanded: (aten.expand, aten.expand_as, aten.repeat, aten.tile),
    _repeated_inside: (aten.repeat_interleave,),
    _along("dim", drops=True): (
        *(
            aten.mean,
            aten.sum,
            aten.prod,
            aten.var,
            aten.std,
            aten.var_mean,
            aten.std_mean,
            aten.amax,
            aten.amin,
        ),
        *(aten.argmax, aten.argmin, aten.any, aten.all, aten.logsumexp, aten.norm, aten.linalg_vector_norm),
    ),
    _compared: (aten.max, aten.min),
    _along("dim"): (
        *(aten.softmax, aten._softmax, aten._safe_softmax, aten.log_softmax, aten._log_softmax, aten.cumprod),
        *(
            aten.cummax,
            aten.cummin,
            aten.logcumsumexp,
            aten.topk,
            aten.glu,
            aten.slice,
            aten.narrow,
            aten.split,
        ),
        *(aten.split_with_sizes, aten.chunk, aten.unsafe_split, aten.unsafe_chunk),
    ),
    _along("dims"): (aten.flip, aten.roll),
    _cumulated: (aten.cumsum,),
    _sorted: (aten.sort,),
    _argsorted: (aten.argsort,),
    _select: (aten.select, aten.unbind),
    _last_dims(_width): (aten.layer_norm, aten.native_layer_norm, aten.rms_norm, aten._fused_rms_norm),
    _channel_groups: (aten.group_norm,),
    _joined: (aten.cat, aten.concat),
    _stacked: (aten.stack,),
    _padded: (aten.pad, aten.constant_pad_nd),
    _linear: (aten.linear,),
    _product("self", "other"): (aten.matmul,),
    _product("self", "mat2"): (aten.mm, aten.bmm),
    _product("mat1", "mat2", "self"): (aten.addmm,),
    _product("batch1", "batch2", "self"): (aten.baddbmm,),
    _einsum: (aten.einsum,),
    _embedding: (aten.embedding,),
    _indexed: (aten.index,),
    _selected_rows: (aten.index_select,),
    _gathered: (aten.gather, aten.scatter, aten.scatter_add, aten.scatter_reduce),
    _written_into: (aten.slice_scatter, aten.select_scatter),
    _divided: (aten.floor_divide, aten.div),
    _put: (aten.index_put,),
    _histogram: (aten.histc,),
    _complex(-1): (aten.view_as_complex,),
    _complex(+1): (aten.view_as_real,),
}
_RULES = {packet: rule for rule, packets in _BY_RULE.items() for packet in packets}
_GROUPED = {"aten::_grouped_mm": _grouped_product, "transformers::grouped_mm_fallback": _grouped_product}
"""Products of sorted entries with one matrix for each key, by their names: one is registered by another library."""
