"""Let the tokens of a group, those of a picture say, see each other.

Before: ``attention(q, k, v, None, is_causal=True)`` or ``attention(q, k, v, %window)``
After:  ``attention(q, k, v, %mask)``, with a mask for each kind of layer whose tokens see groups:
        ``(key <= query or both in one of %groups) [and key > query - window]``

Input of the graph that is added: ``groups [B, S]`` int64, the number of each token's group; 0 for a token that is in
none. A token of a group that waits is seen by none until it comes back, as any other.
"""

from collections.abc import Collection
from dataclasses import replace

import torch

from .base_errors import MatchError
from .base_pass import Pass, PassResult
from .canonicalize_attention import change_attention
from .graph_edit import add_input, aten, edit_after, shape
from .model_graph import ModelGraph
from .reach_masks import emit_masks
from .tensor_names import GROUPS


class SeeGroups(Pass):
    """Args:
    layers: in which tokens see those of their group.
    """

    requires = ("layers",)
    provides = ("groups",)
    excludes = ("groups", "decisions", "caches", "outputs")

    def __init__(self, layers: Collection[int]) -> None:
        self.layers = frozenset(layers)

    def apply(self, graph: ModelGraph) -> PassResult:
        groups = add_input(graph, GROUPS, shape(graph.layers[0].start)[:2], torch.int64)
        if any(reach.state for reach in graph.reaches):
            raise MatchError(
                "Layers know earlier tokens by a state, in a model whose tokens see later ones; expected attention in "
                "all of its layers."
            )
        graph.reaches = tuple(
            replace(reach, groups=i in self.layers) for i, reach in enumerate(graph.reaches)
        )
        grouped = [layer for layer in graph.layers if layer.index in self.layers]
        with edit_after(graph, graph.token_index or groups, region="masks") as edit:
            if graph.token_index is None:
                count = edit.call(aten.arange.default, edit.size(groups, 1), device=groups.meta["val"].device)
                graph.token_index = edit.call(aten.unsqueeze.default, count, 0)
            reaches = [graph.reaches[layer.index] for layer in grouped]
            masks = emit_masks(edit, reaches, graph.token_index, groups)
        for layer, reach in zip(grouped, reaches, strict=True):
            change_attention(layer.attention, mask=masks[reach], is_causal=False)
        return PassResult(self.name, matched=len(grouped), rewritten=len(grouped))
