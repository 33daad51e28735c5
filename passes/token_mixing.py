"""Whether a call lets tokens of the sequence see each other.

A layer can run on a subset of the tokens only if nothing but its attention does. Recognised by the length
symbol: scans, sorts and softmaxes along the sequence, convolutions over it, products that contract it,
reductions over it, and slices or joins along it.
"""

import sympy
import torch
from torch import fx

from .graph_edit import aten, expression, is_op, is_tensor, mentions, named_arguments, sequence_dims, shape

_ALONG_A_DIMENSION = (
    aten.cumsum,
    aten.cumprod,
    aten.cummax,
    aten.cummin,
    aten.logcumsumexp,
    aten.softmax,
    aten._softmax,
    aten.log_softmax,
    aten._log_softmax,
    aten.sort,
    aten.argsort,
    aten.topk,
    aten.slice,
    aten.diff,
    aten.index_select,
)
_ALWAYS = (aten.convolution, aten.conv1d, aten.conv2d, aten.conv3d, aten.flip, aten.roll)
_JOINS = (aten.cat, aten.constant_pad_nd, aten.pad, aten.unfold)
_PRODUCTS = (aten.matmul, aten.bmm, aten.mm, aten.baddbmm, aten.einsum)


def mixes_tokens(node: fx.Node, length: sympy.Expr) -> bool:
    """Whether `node`, which is no attention, reads one token to compute another."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    sources = [n for n in node.all_input_nodes if is_tensor(n) and sequence_dims(n, length)]
    if not sources:
        return False
    if is_op(node, *_ALWAYS):
        return True
    if is_op(node, *_ALONG_A_DIMENSION):
        dim = named_arguments(node).get("dim")
        return dim is not None and dim % len(shape(sources[0])) in sequence_dims(sources[0], length)
    if is_op(node, *_JOINS):
        return _sequence_sizes_differ(node, sources[0], length)
    if is_op(node, *_PRODUCTS):
        first = node.args[0]
        return first in sources and len(shape(first)) - 1 in sequence_dims(first, length)  # type: ignore[arg-type]
    return is_tensor(node) and not any(mentions(size, length) for size in shape(node))


def _sequence_sizes_differ(node: fx.Node, source: fx.Node, length: sympy.Expr) -> bool:
    before = [expression(size) for size in shape(source) if mentions(size, length)]
    after = [expression(size) for size in shape(node) if mentions(size, length)]
    return before != after
