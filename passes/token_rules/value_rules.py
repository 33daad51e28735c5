"""Rules of operators that compute entry by entry, or along dimensions that count no tokens."""

from collections.abc import Callable
from typing import Any

from ..graph_edit import aten, shape
from ..token_rows import Groups, Mixes, Place, Ranks
from .token_call import Call, Rule


def pointwise(call: Call) -> Place:
    rank = len(shape(call.node))
    return call.aligned(call.tensors, rank)


def _chosen(call: Call) -> Place:
    if "self" not in call.given:
        raise Mixes("how many places it finds depends on data")
    return pointwise(call)


def _one_hot(call: Call) -> Place:
    if call.given["num_classes"] < 0:
        raise Mixes("its size depends on the largest value")
    return call.first()


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


def along(*names: str, drops: bool = False) -> Rule:
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


def _width(call: Call) -> int:
    return len(call.given["normalized_shape"])


def _compared(call: Call) -> Place:
    """``max`` and ``min`` of two tensors, or along a dimension."""
    return pointwise(call) if "other" in call.given else along("dim", drops=True)(call)


def _channel_groups(call: Call) -> Place:
    """Normalisation over all but the first dimension."""
    rows = call.first()
    call.refuse(set(range(1, len(shape(call.node)))), rows)
    return rows


VALUES: dict[Rule, tuple[Any, ...]] = {
    pointwise: (aten.__and__, aten.__or__, aten.__xor__, aten.masked_fill, aten.polar, aten.copy, aten.fill),
    _copied: (
        *(aten.to, aten._to_copy, aten.contiguous, aten.clone, aten.alias, aten.detach, aten.lift_fresh_copy),
    ),
    _as_another: (aten.type_as,),
    _filled_like: (aten.empty_like, aten.zeros_like, aten.ones_like, aten.full_like),
    _chosen: (aten.where,),
    _one_hot: (aten.one_hot,),
    along("dim", drops=True): (
        *(aten.mean, aten.sum, aten.prod, aten.any, aten.all, aten.amax, aten.amin, aten.argmax, aten.argmin),
        *(aten.var, aten.std, aten.var_mean, aten.std_mean),
        *(aten.norm, aten.linalg_vector_norm, aten.logsumexp),
    ),
    _compared: (aten.max, aten.min),
    along("dim"): (
        *(aten.softmax, aten._softmax, aten._safe_softmax, aten.log_softmax, aten._log_softmax, aten.glu),
        *(aten.cumprod, aten.cummax, aten.cummin, aten.logcumsumexp, aten.topk, aten.slice, aten.narrow),
        *(aten.split, aten.split_with_sizes, aten.chunk, aten.unsafe_split, aten.unsafe_chunk),
    ),
    along("dims"): (aten.flip, aten.roll),
    _last_dims(_width): (aten.layer_norm, aten.native_layer_norm, aten.rms_norm, aten._fused_rms_norm),
    _channel_groups: (aten.group_norm,),
}
