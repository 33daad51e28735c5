"""Let recurrences end with each row's last token.

Before: ``causal_convolution(%x, %weight, %bias)``, ``gated_delta(...)``, whose states are those behind the last place
After:  the same with ``lengths=%lengths``, in a stage with the number of its rows' active tokens, so that what stands
        behind the tokens of a row never enters its state

Input of the graph that is added where there are no decisions: ``lengths [B]`` int64.
"""

import torch
from torch import fx

from .base_pass import Pass, PassResult
from .graph_edit import add_input, aten, edit_after, shape
from .model_graph import Decision, ModelGraph
from .recurrences import carry, recurrences
from .tensor_names import LENGTHS


class CarryStates(Pass):
    requires = ("layers",)
    provides = ("carried states",)
    excludes = ("caches", "outputs")

    def apply(self, graph: ModelGraph) -> PassResult:
        found = recurrences(graph.fx_graph.nodes)
        if not found:
            return PassResult(self.name, matched=0)
        lengths = next((node for node in graph.inputs if node.name == LENGTHS), None)
        if lengths is None:
            lengths = add_input(graph, LENGTHS, shape(graph.layers[0].start)[:1], torch.int64)
        ends = {0: lengths} | {each.layer: _active(graph, each) for each in graph.decisions}
        for node in found:
            layer = int(node.meta["region"].removeprefix("layer."))
            carry(node, None, ends[max(start for start in ends if start <= layer)])
        return PassResult(self.name, matched=len(found), rewritten=len(found))


def _active(graph: ModelGraph, decision: Decision) -> fx.Node:
    """How many tokens of each row run through the stage of a decision, ``[B]``."""
    with edit_after(graph, decision.positions, region=f"decision.{decision.layer}") as edit:
        ends = edit.call(aten.unsqueeze.default, decision.lengths, 1)
        return edit.call(aten.sum.dim_IntList, edit.call(aten.lt.Tensor, decision.positions, ends), [1])
