"""Remove calls that return their input unchanged.

Before: ``%c = aten.to.dtype(%x, float32)`` with %x already float32, full slices, expansions to the
        same shape, dropout outside training, metadata assertions.
After:  users of %c read %x. The chain of residual values that `FindLayers` looks for is bare.
"""

import torch

from .base_pass import Pass, PassResult
from .graph_edit import aten, is_op, is_tensor, named_arguments, same_size, value
from .model_graph import ModelGraph

_IDENTITY_CANDIDATES = (aten.to, aten._to_copy, aten.slice, aten.expand, aten.alias, aten.detach)


class RemoveNoOps(Pass):
    def apply(self, graph: ModelGraph) -> PassResult:
        removed = 0
        for node in list(graph.fx_graph.nodes):
            if is_op(node, aten._assert_tensor_metadata):
                graph.fx_graph.erase_node(node)
            elif _returns_its_input(node):
                node.replace_all_uses_with(node.args[0])
                graph.fx_graph.erase_node(node)
            else:
                continue
            removed += 1
        return PassResult(self.name, matched=removed, rewritten=removed)


def _returns_its_input(node: torch.fx.Node) -> bool:
    if is_op(node, aten.dropout):
        return not named_arguments(node)["train"]
    if is_op(node, aten.add.Tensor):
        added = node.args[1]
        return isinstance(added, int) and added == 0 and _same_metadata(node)
    return is_op(node, *_IDENTITY_CANDIDATES) and _same_metadata(node)


def _same_metadata(node: torch.fx.Node) -> bool:
    source = node.args[0]
    if not is_tensor(source):
        return False
    x, y = value(source), value(node)
    return (
        x.dtype == y.dtype
        and x.device == y.device
        and len(x.shape) == len(y.shape)
        and all(same_size(a, b) for a, b in zip(x.shape, y.shape, strict=True))
    )
