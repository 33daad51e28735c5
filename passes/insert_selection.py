"""Score and select the visual tokens before each decision layer.

Before: ``%h -> layer 7 -> ...``
After:  ``%query = layer 7's rotated query of each row's last token``, ``%keys = layer 7's rotated keys of %h``,
        ``%scores = reroute.visual_scores(%query, %keys, %visual_index, %lengths)``,
        ``%positions, %kept = reroute.select_tokens(%scores, %visual_index, %lengths, %keep_7, ...)``.
        The layers themselves are as before; `RouteStages` makes them use the selection.

The query and the keys are partial replays of the layer on its own input: the layer's own norm,
projections and rotary positions (Reroute, arXiv 2606.12412, section 3).

Inputs of the graph that are added, all but the first two for each decision layer: ``visual_index [B, N]``,
``lengths [B]``, with several pools ``pools [B, N]``, ``keep_7 [B, N]`` and ``slots_7 [S']``, of which only the
size is read. See the operators for what they mean. How many tokens are kept is known from the prompt
alone, so every shape is known before the program runs.
"""

from collections.abc import Sequence

import torch
from torch import fx

from .canonicalize_attention import attention_arguments
from .decoder_graph import Decision, DecoderGraph, Layer
from .errors import MatchError
from .graph_edit import Editor, add_input, ancestors, edit_after, expression, shape, value
from .interface import Pass, PassResult
from .replay import AllRows, LastTokens, Replay


class InsertSelection(Pass):
    """Args:
    decision_layers: ascending layer indices.
    several_pools: whether a row's visual tokens compete in several pools, one for each image.
    """

    def __init__(self, decision_layers: Sequence[int], several_pools: bool = False) -> None:
        self.decision_layers = tuple(decision_layers)
        self.several_pools = several_pools

    def apply(self, graph: DecoderGraph) -> PassResult:
        if not self.decision_layers:
            return PassResult(self.name)
        deepest, found = self.decision_layers[-1], len(graph.layers)
        if deepest >= found:
            raise MatchError(
                f"decision_layers has {deepest}, but the graph has {found} layers; expected 1..{found - 1}."
            )
        batch = value(graph.layers[0].start).shape[0]
        visual_index = add_input(graph, "visual_index", (batch, "visual_tokens"), torch.int64)
        lengths = add_input(graph, "lengths", (batch,), torch.int64)
        pools = None
        if self.several_pools:
            pools = add_input(graph, "pools", (batch, "visual_tokens"), torch.int64)
        # All inputs stand before the first decision that is inserted.
        inputs = [
            (
                add_input(graph, f"keep_{index}", (batch, "visual_tokens"), torch.bool),
                add_input(graph, f"slots_{index}", (f"slots_{index}",), torch.bool),
            )
            for index in self.decision_layers
        ]
        graph.decisions = tuple(
            _insert(graph, graph.layers[index], visual_index, lengths, keep, pools, slots)
            for index, (keep, slots) in zip(self.decision_layers, inputs, strict=True)
        )
        done = len(graph.decisions)
        return PassResult(self.name, matched=done, rewritten=done)


def _insert(
    graph: DecoderGraph,
    layer: Layer,
    visual_index: fx.Node,
    lengths: fx.Node,
    keep: fx.Node,
    pools: fx.Node | None,
    slots: fx.Node,
) -> Decision:
    attention = attention_arguments(layer.attention)
    with edit_after(graph, layer.attention.prev, region=f"decision.{layer.index}") as edit:
        query = _replay(edit, layer, attention.query, LastTokens(edit, lengths))
        keys = _replay(edit, layer, attention.key, AllRows())
        scoring = torch.ops.reroute.visual_scores.default
        scores = edit.call(scoring, query, keys, visual_index, lengths, attention.scale)
        sizes = edit.size(layer.start, 1), edit.size(slots, 0)
        selection = torch.ops.reroute.select_tokens.default
        choice = edit.call(selection, scores, visual_index, lengths, keep, pools, *sizes)
        positions, kept = edit.unpack(choice)
    return Decision(layer.index, visual_index, lengths, scores, positions, kept, tuple(edit.emitted))


def _replay(edit: Editor, layer: Layer, target: fx.Node, tokens: AllRows | LastTokens) -> fx.Node:
    """Compute `target` of a layer on `tokens` of its input."""
    batch, length = (expression(size) for size in shape(layer.start)[:2])
    needed = ancestors([target], stop=layer.start)
    stream = tokens.rows(edit, layer.start, 1)
    replay = Replay(edit, tokens, length, batch, {layer.start: stream})
    replay.run(node for node in layer.nodes if node in needed)
    counterpart: fx.Node = replay(target)
    return counterpart
