"""Rules of operators that lay the same elements out otherwise: under other sizes, in another order, beside others."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..graph_edit import aten, expression, is_tensor, same_size, shape
from ..token_rows import Mixes, Place, Rows, agreed, reshaped
from .token_call import Call, Rule


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


def _transposed(call: Call, rank: int) -> list[int]:
    return [*range(rank - 2), rank - 1, rank - 2]


def _select(call: Call) -> Place:
    rows, rank = call.first(), len(shape(call.tensors[0]))
    dim = call.dim(call.given["dim"])
    return rows and rows.moved({d: d - (d > dim) for d in range(rank) if d != dim})


def _complex(change: int) -> Rule:
    def rule(call: Call) -> Place:
        rows, rank = call.first(), len(shape(call.tensors[0]))
        return rows and rows.moved({dim: dim for dim in range(rank + min(change, 0))})

    return rule


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


def _repeated(call: Call) -> Place:
    """``repeat(x, n, 1)``: the tokens as a whole n times, one behind the other, once for each expert say."""
    source = call.tensors[0]
    rows, sizes = call.rows(source), shape(call.node)
    if rows is None or rows.order is not None or len(sizes) != len(shape(source)):
        return _expanded(call)
    times = [expression(new) / expression(old) for new, old in zip(sizes, shape(source), strict=True)]
    if any(not times[dim].is_Integer for dim in rows.dims):
        return _expanded(call)
    tokens, batch = (
        axis and replace(axis, outer=axis.outer * times[axis.dim]) for axis in (rows.tokens, rows.batch)
    )
    return Rows(tokens, batch)  # type: ignore[arg-type]


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


def _joined(call: Call) -> Place:
    tensors = [tensor for tensor in call.given["tensors"] if is_tensor(tensor)]
    rows = call.aligned(tensors, len(shape(tensors[0])))
    call.refuse({call.dim(call.given["dim"])}, rows)
    return rows


def _stacked(call: Call) -> Place:
    tensors, rank = call.given["tensors"], len(shape(call.node))
    rows, new = call.aligned(tensors, rank - 1), call.dim(call.given["dim"], rank)
    return rows and rows.moved({dim: dim + (dim >= new) for dim in range(rank - 1)})


def _padded(call: Call) -> Place:
    rows, rank = call.first(), len(shape(call.node))
    pairs = list(zip(call.given["pad"][::2], call.given["pad"][1::2], strict=True))
    call.refuse({rank - 1 - place for place, pair in enumerate(pairs) if pair != (0, 0)}, rows)
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


SHAPES: dict[Rule, tuple[Any, ...]] = {
    _view: (aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze),
    _typed_view: (aten.view,),
    _permuted(_swapped): (aten.transpose, aten.swapaxes, aten.swapdims),
    _permuted(_transposed): (aten.mT, aten.adjoint),
    _permuted(lambda _, rank: list(reversed(range(rank)))): (aten.t, aten.numpy_T),
    _permuted(lambda call, rank: [call.dim(d, rank) for d in call.given["dims"]]): (aten.permute,),
    _expanded: (aten.expand, aten.expand_as),
    _repeated: (aten.repeat, aten.tile),
    _repeated_inside: (aten.repeat_interleave,),
    _select: (aten.select, aten.unbind),
    _joined: (aten.cat, aten.concat),
    _stacked: (aten.stack,),
    _padded: (aten.pad, aten.constant_pad_nd),
    _written_into: (aten.slice_scatter, aten.select_scatter),
    _complex(-1): (aten.view_as_complex,),
    _complex(+1): (aten.view_as_real,),
}
