"""Name the kernels of attention in a graph for a GPU.

Before: ``scaled_dot_product_attention(%query, %key, %value, %mask, ...)``, for which PyTorch chooses while the graph is
        traced, by settings of the process and the kind of GPU
After:  ``_scaled_dot_product_flash_attention(...)[0]`` where flash attention can, which takes no mask;
        ``_scaled_dot_product_efficient_attention(...)[0]`` where that can, with booleans of a mask as what they add to
        the logits; unchanged where neither can: there PyTorch takes cuDNN's, or single operators

On an H100 PyTorch prefers cuDNN's, which is planned anew for each shape, and routing makes many shapes. No setting of
the process is changed, and a compiler's cache tells the choices apart.
"""

import logging
import math
import operator
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.backends import cuda

from ..passes.graph_edit import hint, same_size, shape, value

aten = torch.ops.aten
FLASH, EFFICIENT, OTHER = "flash", "memory-efficient", "left to PyTorch"
_ALIGNED = 8
"""Flash attention takes heads whose width is a multiple of this; PyTorch pads others."""
logger = logging.getLogger(__name__)


def pin_attention(module: fx.GraphModule, device: torch.device) -> tuple[str, ...]:
    """Name the kernels in `module`, in place, and log them.

    Returns:
        What was chosen for each attention, in order; nothing if `device` is no GPU.
    """
    if device.type != "cuda":
        return ()
    chosen = []
    for node in module.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        kernel = _kernel(node, device)
        logger.info("attention of %s to %s on %s: %s", *map(shape, node.args[:2]), device, kernel)
        if kernel != OTHER:
            _call(node, kernel)
        chosen.append(kernel)
    module.recompile()
    return tuple(chosen)


def _kernel(node: fx.Node, device: torch.device) -> str:
    """The first that can, by what PyTorch says of tensors as large as those that the program was captured with."""
    with FakeTensorMode():
        query, key, values, mask, dropout, is_causal = (_example(argument, device) for argument in node.args)
    asked = cuda.SDPAParams(query, key, values, mask, dropout, is_causal, bool(node.kwargs["enable_gqa"]))
    if query.shape[3] % _ALIGNED == 0 and cuda.can_use_flash_attention(asked):
        return FLASH
    can_add = mask is None or mask.ndim == 4
    return EFFICIENT if can_add and cuda.can_use_efficient_attention(asked) else OTHER


def _example(argument: Any, device: torch.device) -> Any:
    if not isinstance(argument, fx.Node):
        return argument
    fake = value(argument)
    sizes, strides = [hint(size) for size in fake.shape], [hint(stride) for stride in fake.stride()]
    return torch.empty_strided(sizes, strides, dtype=fake.dtype, device=device)


def _call(node: fx.Node, kernel: str) -> None:
    query, key, values, mask, _, is_causal = node.args
    given: tuple[Any, ...]
    with node.graph.inserting_before(node):
        if kernel == FLASH:
            operation = aten._scaled_dot_product_flash_attention.default
            given = query, key, values, 0.0, is_causal, False
        else:
            operation = aten._scaled_dot_product_efficient_attention.default
            given = query, key, values, mask and _added(node, mask), False, 0.0, is_causal
        results = node.graph.call_function(operation, given, {"scale": node.kwargs["scale"]})
        result = node.graph.call_function(operator.getitem, (results, 0))
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)


def _added(node: fx.Node, mask: Any) -> fx.Node:
    """What a mask adds to the logits, ``[B, H, Q, K]``."""
    graph, (query, key, *_) = node.graph, node.args
    added = mask
    if value(mask).dtype == torch.bool:
        numbers = graph.call_function(aten.where.Scalar, (mask, 0.0, -math.inf))
        added = graph.call_function(aten.to.dtype, (numbers, value(query).dtype))
    sizes: list[Any] = []
    for dim, (source, place) in enumerate(((query, 0), (query, 1), (query, 2), (key, 2))):
        size = shape(source)[place]
        if same_size(shape(mask)[dim], size):
            size = -1
        elif not isinstance(size, int):
            size = graph.call_function(aten.sym_size.int, (source, place))
        sizes.append(size)
    return graph.call_function(aten.expand.default, (added, sizes))
