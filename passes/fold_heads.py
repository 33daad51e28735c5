"""Let query heads that share keys be queries of one head, where a mask says what each query sees.

Before: ``attention(%query, %keys, %values, %mask)``, queries of G heads for each head of the keys:
        ``[B, Hkv * G, Q, D]`` and ``[B, Hkv, C, D]``, mask ``[B, 1, Q, C]``
After:  the same on ``[B, Hkv, G * Q, D]`` with a mask ``[B, 1, G * Q, C]``, viewed as it was. The mask is made once for
        all layers that read it.

It is the same arithmetic, and keys are read once for all heads of a group. For GPUs PyTorch has no fused kernel that
takes both groups and a mask: it would repeat keys and values for each query head, and attend in float32 step by step.
A mask that differs between heads is left alone, and so are causal attentions, which flash attention takes as they are.
"""

from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from .base_pass import Pass, PassResult, Rejection
from .canonicalize_attention import Attention, attention_arguments, attentions, change_attention
from .graph_edit import aten, edit_after, is_op, same_size, shape, value
from .model_graph import ModelGraph


class FoldHeads(Pass):
    requires = ("canonical attention",)

    def apply(self, graph: ModelGraph) -> PassResult:
        matched, rejected = 0, []
        masks: dict[tuple[fx.Node, int], fx.Node] = {}
        for node in list(attentions(graph)):
            if not is_op(node, aten.scaled_dot_product_attention):
                continue
            given = attention_arguments(node)
            if given.mask is None or given.is_causal or not _is_grouped(given):
                continue
            matched += 1
            if len(shape(given.mask)) != 4 or not same_size(shape(given.mask)[1], 1):
                reason = f"its mask is {list(shape(given.mask))}, not one for all heads, [B, 1, Q, C]"
                rejected.append(Rejection(node.name, reason))
                continue
            kind = given.mask, int(shape(given.query)[1]) // int(shape(given.key)[1])
            if kind not in masks:
                masks[kind] = _mask_of_groups(graph, *kind)
            _fold(graph, node, given, masks[kind])
        return PassResult(self.name, matched, matched - len(rejected), tuple(rejected))


def _is_grouped(given: Attention) -> bool:
    return not same_size(shape(given.query)[1], shape(given.key)[1])


def _mask_of_groups(graph: ModelGraph, mask: fx.Node, group: int) -> fx.Node:
    """``[B, 1, G * Q, C]`` of ``[B, 1, Q, C]``; one for all queries serves as it is."""
    if same_size(shape(mask)[2], 1):
        return mask
    with edit_after(graph, mask, mask.meta.get("region", "")) as edit:
        apart = edit.call(aten.unsqueeze.default, mask, 2)
        each = edit.call(aten.expand.default, apart, [-1, -1, group, -1, -1])
        return edit.call(aten.flatten.using_ints, each, 2, 3)


def _fold(graph: ModelGraph, node: fx.Node, given: Attention, mask: fx.Node) -> None:
    heads, region = shape(given.key)[1], node.meta.get("region", "")
    with edit_after(graph, node.prev, region) as edit:
        batch, new = edit.size(given.query, 0), edit.size(given.query, 2)
        apart = edit.call(aten.reshape.default, given.query, [batch, heads, -1, new, shape(given.query)[3]])
        folded = edit.call(aten.flatten.using_ints, apart, 2, 3)
    change_attention(node, query=folded, mask=mask)
    whole = value(node)
    with graph.fake_mode, enable_python_dispatcher():
        node.meta["val"] = whole.new_empty((*shape(folded)[:3], whole.shape[3]))
    with edit_after(graph, node, region) as edit:
        result = edit.call(aten.reshape.default, node, [batch, whole.shape[1], new, whole.shape[3]])
    node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
