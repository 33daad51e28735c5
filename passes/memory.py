"""Which values of a graph may share memory, by what their operators declare.

Storages of fake tensors would say it too, but a program that was saved and loaded has none in common.
"""

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_COMPUTED = (
    *(aten.linear, aten.matmul, aten.outer, aten.layer_norm, aten.rms_norm, aten.group_norm, aten.softmax),
    *(
        aten.log_softmax,
        aten.scaled_dot_product_attention,
        aten.conv1d,
        aten.conv2d,
        aten.argsort,
        aten.one_hot,
    ),
    *(aten.var, aten.std, aten.where, aten.repeat_interleave, aten.pad, aten.type_as, aten.sym_size),
)
"""Composite operators that return memory of their own. Others, dropout say, may return their argument undeclared."""


def may_share_memory(node: fx.Node) -> bool:
    """Whether a result of a call may share memory with an argument."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or any(result.alias_info is not None for result in schema.returns):
        return not _is_copied(node)
    if torch.Tag.pointwise in node.target.tags or node.target.overloadpacket in _COMPUTED:  # type: ignore[union-attr]
        return _is_undeclared_cast(node)
    return bool(node.target.has_kernel_for_dispatch_key(_COMPOSITE))  # type: ignore[union-attr]


def shared_memory(nodes: Iterable[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    """For each node those that may share memory with it, itself included; values that share have one set."""
    groups: dict[fx.Node, set[fx.Node]] = {}
    elements: dict[tuple[Any, ...], fx.Node] = {}
    for node in nodes:
        together = {node}
        if node.target is operator.getitem and not may_share_memory(node.args[0]):  # type: ignore[arg-type]
            together |= groups.get(elements.setdefault(node.args, node), set())
        elif node.op == "call_function" and may_share_memory(node):
            for source in _aliased(node):
                together |= groups[source]
        for member in together:
            groups[member] = together
    return groups


def _aliased(node: fx.Node) -> list[fx.Node]:
    """Arguments that a result may share memory with: those that are declared, or all."""
    schema = getattr(node.target, "_schema", None)
    arguments = list(zip(schema.arguments, node.args, strict=False)) if schema else []
    declared = [given for argument, given in arguments if argument.alias_info is not None]
    found: list[fx.Node] = []
    for given in declared:
        found += [
            n for n in (given if isinstance(given, (list, tuple)) else [given]) if isinstance(n, fx.Node)
        ]
    return found or list(node.all_input_nodes)


def _is_copied(node: fx.Node) -> bool:
    """Whether a cast that may return its argument does not, for another dtype or device."""
    return getattr(node.target, "overloadpacket", None) is aten.to and not _is_same_kind(node)


def _is_undeclared_cast(node: fx.Node) -> bool:
    return node.target is aten.type_as.default and _is_same_kind(node)


def _is_same_kind(node: fx.Node) -> bool:
    source, result = (n.meta.get("val") for n in (node.args[0], node))  # type: ignore[union-attr]
    return (source.dtype, source.device) == (result.dtype, result.device)  # type: ignore[union-attr]
