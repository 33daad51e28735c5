"""Spell every attention in one way.

Before: ``scaled_dot_product_attention(q, repeat(k), repeat(v), mask)``, where repeat is
        unsqueeze-expand-reshape over key-value groups, or the eager spelling
        ``matmul(softmax(matmul(q, k^T) * scale + mask), v)``.
After:  ``scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=..., enable_gqa=...)``
        with the keys and values as they are cached, [B, Hkv, S, D]. With sinks, a logit for each head that
        stands for no token, ``reroute.attention_with_sinks(q, k, v, sinks, mask, is_causal, scale)``, which a
        decoder is captured with. With logits that are bounded likewise
        ``reroute.attention_with_softcap(q, k, v, softcap, mask, is_causal, scale)``.

Only spellings that are verified argument by argument are rewritten. Anything else that looks like
attention is rejected with a reason.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from .base_pass import Pass, PassResult, Rejection, refuse
from .graph_edit import aten, is_op, is_tensor, named_arguments, same_size, shape, value
from .model_graph import ModelGraph

_SOFTMAX = (aten.softmax, aten._softmax)
_MATMUL = (aten.matmul, aten.bmm)
_WITH_SINKS = torch.ops.reroute.attention_with_sinks
_WITH_SOFTCAP = torch.ops.reroute.attention_with_softcap
ATTENTION = (aten.scaled_dot_product_attention, _WITH_SINKS, _WITH_SOFTCAP)
"""Operators of canonical attentions."""


@dataclass(frozen=True)
class Attention:
    """Arguments of an attention in canonical form."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    is_causal: bool
    scale: float
    sinks: fx.Node | None = None
    softcap: float | None = None


class _NotCanonical(Exception):
    """Why a candidate can't be brought into canonical form."""


def attention_arguments(node: fx.Node) -> Attention:
    """Read the arguments of a canonical attention node."""
    given = named_arguments(node)
    return Attention(
        given["query"],
        given["key"],
        given["value"],
        given["attn_mask"],
        given["is_causal"],
        given["scale"],
        given.get("sinks"),
        given.get("softcap"),
    )


def change_attention(node: fx.Node, **changed: Any) -> None:
    """Give a canonical attention other arguments, by their names in `Attention`."""
    _rewrite(node, replace(attention_arguments(node), **changed))


class CanonicalizeAttention(Pass):
    provides = ("canonical attention",)

    def apply(self, graph: ModelGraph) -> PassResult:
        matched, rejected = [], []
        for node in list(graph.fx_graph.nodes):
            if node in matched:
                continue
            try:
                if is_op(node, aten.scaled_dot_product_attention):
                    attention = _read_fused(node)
                elif is_op(node, _WITH_SINKS, _WITH_SOFTCAP):
                    attention = attention_arguments(node)
                elif is_op(node, *_SOFTMAX) and _over_keys(node):
                    attention, node = _read_eager(node)
                else:
                    continue
            except _NotCanonical as reason:
                rejected.append(Rejection(node.name, str(reason)))
                continue
            _rewrite(node, attention)
            matched.append(node)
        if rejected:
            raise refuse(
                f"{len(matched)} attention blocks have a known form, {len(rejected)} do not",
                "every attention as scaled_dot_product_attention or matmul-softmax-matmul",
                tuple(rejected),
            )
        return PassResult(self.name, matched=len(matched), rewritten=len(matched))


def _rewrite(node: fx.Node, attention: Attention) -> None:
    """Spell `node` canonically; its name and its fake value stay."""
    if attention.sinks is not None or attention.softcap is not None:
        own, more = (_WITH_SINKS, attention.sinks) if attention.sinks else (_WITH_SOFTCAP, attention.softcap)
        node.target = own.default
        node.args = (attention.query, attention.key, attention.value, more)
        node.args += (attention.mask, attention.is_causal, attention.scale)
        node.kwargs = {}
        return
    grouped = not same_size(shape(attention.query)[1], shape(attention.key)[1])
    node.target = aten.scaled_dot_product_attention.default
    node.args = (attention.query, attention.key, attention.value, attention.mask, 0.0, attention.is_causal)
    node.kwargs = {"scale": attention.scale, "enable_gqa": grouped}


def _read_fused(node: fx.Node) -> Attention:
    given = named_arguments(node)
    if given["dropout_p"] != 0.0:
        raise _NotCanonical(f"dropout {given['dropout_p']} is active")
    query, key, values = given["query"], given["key"], given["value"]
    if len(shape(query)) != 4:
        raise _NotCanonical(f"query has shape {list(shape(query))}, not [B, H, S, D]")
    if not given["enable_gqa"]:
        key, values = _without_repeat(query, key, values)
    scale = given["scale"] if given["scale"] is not None else int(shape(query)[3]) ** -0.5
    return Attention(query, key, values, given["attn_mask"], given["is_causal"], scale)


def _without_repeat(query: fx.Node, key: fx.Node, values: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Keys and values before they were repeated for grouped-query attention."""
    grouped = _before_repeat(key), _before_repeat(values)
    if grouped == (None, None):
        if not same_size(shape(key)[1], shape(query)[1]):
            raise _NotCanonical(f"{shape(query)[1]} query heads but {shape(key)[1]} key heads")
        if _seems_repeated(key) or _seems_repeated(values):
            raise _NotCanonical("keys are repeated over the heads in an unknown way")
        return key, values
    if grouped[0] is None or grouped[1] is None:
        raise _NotCanonical("keys and values are not repeated in the same way")
    return grouped  # type: ignore[return-value]


def _seems_repeated(node: fx.Node) -> bool:
    reshaped = _is_reshape(node) and is_op(_before_copy(node.args[0]), aten.expand)
    return reshaped or is_op(node, aten.repeat, aten.tile, aten.repeat_interleave)


def _before_repeat(repeated: fx.Node) -> fx.Node | None:
    """X of ``x[:, :, None].expand(B, Hkv, n, S, D).reshape(B, Hkv * n, S, D)``; None for anything else.

    Queries and keys with norms of their own are laid out in memory such that the reshape is a clone and a view.
    """
    if is_op(repeated, aten.repeat_interleave):
        given = named_arguments(repeated)
        return given["self"] if given["dim"] == 1 and isinstance(given["repeats"], int) else None
    if not _is_reshape(repeated):
        return None
    expanded = _before_copy(repeated.args[0])
    if not is_op(expanded, aten.expand) or not is_op(expanded.args[0], aten.unsqueeze):  # type: ignore[union-attr]
        return None
    source, dim = expanded.args[0].args  # type: ignore[union-attr]
    before, after = shape(source), shape(repeated)  # type: ignore[arg-type]
    wide = shape(expanded)  # type: ignore[arg-type]
    keeps_the_rest = all(same_size(before[i], after[i]) for i in (0, 2, 3))
    is_head_repeat = (
        dim in (2, -3)
        and len(before) == len(after) == 4
        and keeps_the_rest
        and same_size(wide[1], before[1])
        and same_size(before[1] * wide[2], after[1])
    )
    return source if is_head_repeat else None  # type: ignore[return-value]


def _is_reshape(node: fx.Node) -> bool:
    return is_op(node, aten.reshape, aten.view, aten._unsafe_view)


def _before_copy(node: Any) -> Any:
    """What a reshape reads, which may be spelt as a copy that is then viewed."""
    return node.args[0] if is_op(node, aten.clone) else node


def _over_keys(softmax: fx.Node) -> bool:
    """Whether a softmax runs over what look like the logits of an attention."""
    size = shape(softmax)
    return len(size) == 4 and (same_size(size[2], size[3]) or _product_of_activations(softmax.args[0]))


def _product_of_activations(node: Any) -> bool:
    while is_op(node, aten.to, aten._to_copy, aten.add, aten.mul, aten.div):
        node = node.args[0]
    return is_op(node, *_MATMUL) and all(is_tensor(a) and a.op != "placeholder" for a in node.args)


def _read_eager(softmax: fx.Node) -> tuple[Attention, fx.Node]:
    """The attention around a softmax, and the product with the values that ends it."""
    if named_arguments(softmax)["dim"] not in (-1, 3):
        raise _NotCanonical(f"softmax over dimension {named_arguments(softmax)['dim']}, not over the keys")
    product = _only_user(softmax)
    while is_op(product, aten.to, aten._to_copy):
        product = _only_user(product)
    if not is_op(product, *_MATMUL) or not _comes_from(product.args[0], softmax):
        raise _NotCanonical(f"its result goes into {product.target}, not into a product with the values")
    logits, mask, scale = _read_logits(softmax.args[0])
    query, transposed = logits.args
    given = named_arguments(transposed) if is_op(transposed, aten.transpose) else {}
    if {given.get("dim0"), given.get("dim1")} not in ({2, 3}, {-2, -1}, {2, -1}, {-2, 3}):
        raise _NotCanonical("keys are not transposed over their last two dimensions")
    key, values = _without_repeat(query, given["self"], product.args[1])  # type: ignore[arg-type]
    return Attention(query, key, values, mask, False, scale), product  # type: ignore[arg-type]


def _read_logits(node: Any) -> tuple[fx.Node, fx.Node | None, float]:
    """Read ``matmul(q, k^T) * scale + mask`` from its result; scale and mask may be missing."""
    mask, scale = None, 1.0
    while is_op(node, aten.to, aten._to_copy):
        node = node.args[0]
    if is_op(node, aten.add.Tensor) and is_tensor(node.args[1]):
        if named_arguments(node)["alpha"] != 1 or not value(node.args[1]).is_floating_point():
            raise _NotCanonical(f"%{node.name} adds something to the logits that is no additive mask")
        node, mask = node.args[:2]
    if is_op(node, aten.mul.Tensor, aten.mul.Scalar) and isinstance(node.args[1], (int, float)):
        node, scale = node.args[0], float(node.args[1])
    elif is_op(node, aten.div.Tensor, aten.div.Scalar) and isinstance(node.args[1], (int, float)):
        node, scale = node.args[0], 1.0 / node.args[1]
    if not is_op(node, *_MATMUL):
        raise _NotCanonical(
            f"its logits come from {getattr(node, 'target', node)}, not from query times keys"
        )
    return node, mask, scale


def _comes_from(node: Any, source: fx.Node) -> bool:
    return node is source or (is_op(node, aten.to, aten._to_copy) and _comes_from(node.args[0], source))


def _only_user(node: fx.Node) -> fx.Node:
    if len(node.users) != 1:
        raise _NotCanonical(f"%{node.name} has {len(node.users)} users, expected one")
    return next(iter(node.users))


def attentions(graph: ModelGraph) -> Iterator[fx.Node]:
    """Canonical attention nodes in graph order."""
    yield from (n for n in graph.fx_graph.nodes if is_op(n, *ATTENTION))
