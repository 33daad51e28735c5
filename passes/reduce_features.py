"""Reduce the features of pictures in the vision tower, before they are projected.

Before: ``%state = layer ... -> %picked = %state less its first token -> projector -> features`` of all N patches
After:  ``%indices, %reduced = reduce(%picked, attention, states)``, ``%projected = projector(%reduced)`` on n patches,
        and ``features = scatter(-inf, %indices, %projected)``: rows of -inf stand for patches that are gone

The rule is traced. It is given the states that `FindStates` found. What is picked from them is found by dataflow;
everything between the picked value and the output treats each patch alone.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from .base_errors import MatchError
from .base_pass import Pass, PassResult
from .canonicalize_attention import attention_arguments, attentions
from .emit_traced import emit
from .graph_edit import Editor, ancestors, aten, descendants, edit_after, is_tensor, shape
from .model_graph import ModelGraph

GONE = -torch.inf
"""What the features of a patch hold that was dropped before the decoder."""


@dataclass(frozen=True)
class TowerStates:
    """What a reduction may read.

    Attributes:
        features: of each patch, as they are picked for the projector, ``[B, N, D]``.
        query: of the first token, which is no patch, in the layer whose output is picked, ``[B, H, 1, Dh]``; None if
            all tokens are patches.
        keys: of all tokens in that layer, ``[B, H, T, Dh]``.
        scale: its factor on their products.
        states: what enters the first layer and what leaves each layer, ``[B, T, D]`` each; patches come last.
        count: patches to keep, n.
    """

    features: torch.Tensor
    query: torch.Tensor | None
    keys: torch.Tensor
    scale: float
    states: Sequence[torch.Tensor]
    count: int


Reduce = Callable[[TowerStates], tuple[torch.Tensor, torch.Tensor]]
"""Indices ``[B, n]`` int64 of the patches that stay, ascending, and their features ``[B, n, D]``."""


class ReduceFeatures(Pass):
    """Args:
    reduce: the rule.
    tokens: patches of a picture, N.
    count: patches that stay, n.
    """

    requires = ("states", "canonical attention")
    provides = ("reduced features",)
    excludes = ("reduced features",)

    def __init__(self, reduce: Reduce, tokens: int, count: int) -> None:
        self.reduce, self.tokens, self.count = reduce, tokens, count

    def apply(self, graph: ModelGraph) -> PassResult:
        blocks, states = list(attentions(graph)), graph.states
        if not blocks or len(blocks) != len(states) - 1:
            raise MatchError(
                f"The tower has {len(blocks)} attentions in {max(0, len(states) - 1)} layers; expected one in each."
            )
        picked, projected = self._projector(graph, states)
        layer = max(i for i, state in enumerate(states) if state in ancestors([picked]))
        attention = attention_arguments(blocks[layer - 1])
        first = shape(states[layer])[1] - self.tokens
        name = f"The reduction {getattr(self.reduce, '__name__', self.reduce)!s}"
        with edit_after(graph, projected, region="reduction") as edit:
            query = edit.call(aten.slice.Tensor, attention.query, 2, 0, 1) if first else None
            given = {
                "features": picked,
                "query": query,
                "keys": attention.key,
                "scale": attention.scale,
                "states": states,
                "count": self.count,
            }
            results = emit(edit, name, lambda **known: self.reduce(TowerStates(**known)), given)
            if len(results) != 2 or [shape(r)[1] for r in results] != [self.count] * 2:
                raise MatchError(
                    f"{name} returned shapes {[list(shape(r)) for r in results]}; expected indices "
                    f"[B, {self.count}] and features [B, {self.count}, D]."
                )
            indices, reduced = results
            rows = copy_between(edit, picked, reduced, projected)
            spread = {"indices": indices, "rows": rows, "tokens": self.tokens}
            (features,) = emit(edit, "The scatter of features", _spread, spread)
        projected.replace_all_uses_with(features, partial(operator.lt, features))
        graph.states = ()
        return PassResult(
            self.name, matched=1, rewritten=1, detail=f"{self.count} of {self.tokens} patches stay"
        )

    def _projector(self, graph: ModelGraph, states: Sequence[fx.Node]) -> tuple[fx.Node, fx.Node]:
        """The value that is picked from a state, and what it has become just before the pictures are joined."""
        (features,) = graph.fx_graph.output_node().all_input_nodes
        after = descendants(states[-1]) | set().union(*(descendants(state) for state in states[1:]))
        path = [n for n in graph.fx_graph.nodes if n in ancestors([features]) & after - set(states)]
        outside = [n for n in path if not str(n.meta.get("region", "")).startswith("layer.")]
        of_patches = [
            n for n in outside if is_tensor(n) and len(shape(n)) == 3 and shape(n)[1] == self.tokens
        ]
        if not of_patches:
            raise MatchError(
                f"No value of shape [pictures, {self.tokens}, D] lies between the tower's layers and its features; "
                f"expected the features of each picture's patches before they are joined."
            )
        return of_patches[0], of_patches[-1]


def copy_between(edit: Editor, first: fx.Node, instead: fx.Node, last: fx.Node) -> fx.Node:
    """What `last` would be, were `instead` in the place of `first`."""
    between = descendants(first) & ancestors([last]) - {first}
    in_order = [node for node in edit.graph.fx_graph.nodes if node in between]
    return edit.copy_all(in_order, {first: instead})[last]


def _spread(indices: torch.Tensor, rows: torch.Tensor, tokens: int) -> torch.Tensor:
    gone = rows.new_full((rows.shape[0], tokens, rows.shape[2]), GONE)
    return gone.scatter(1, indices[..., None].expand_as(rows), rows)
