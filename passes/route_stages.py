"""Run each stage on the active tokens only.

Before: ``%h -> layer 7 .. layer 14 -> %h'`` on all S rows, and a selection at layer 7.
After, by action:

``compact_route_stagewise``
    ``compact(%h) -> layer 7 .. layer 14 -> restore into %h``
``compact_route``
    ``compact(%h) -> layer 7 -> restore``, then the same for layer 8, and so on
``physical_delete``
    as stagewise, but the next decision scores and selects on the compact stream; nothing comes back

Deferred rows keep the residual value that they had when they were deferred. What the layers of their stage add to
every token whatever it holds (`Layer.addends`) they get when they come back. At the end the output has
all S rows again, each at its own place. Rotary positions are gathered, gaps and all; contiguous ones are those of the
first S' tokens instead. Masks are computed anew for each stage, from the places that its rows had among all tokens:
a token that is 9 tokens back stays out of a window of 8 when those between wait.

Where the scoring layer of the next decision lies inside a stage, the input of that layer is restored as well, and on
demand that of every layer, for `ExposeStreams`.

A layer that attends with keys and values of an earlier one has those of its own stage's rows. Where that earlier layer
lies in an earlier stage, they are made of its restored input for all rows, and gathered: of tokens that waited there,
from the residual value that they waited with. What was deleted is in no later stage.
"""

import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from .base_errors import MatchError
from .base_pass import Pass, PassResult
from .canonicalize_attention import attention_arguments
from .graph_edit import (
    NO_TOKEN,
    Editor,
    ancestors,
    aten,
    descendants,
    edit_after,
    expression,
    sequence_dims,
    shape,
)
from .model_graph import Decision, Layer, ModelGraph
from .number_stages import position_input
from .replay import AllRows, Replay, compact, compact_heads, sequence_inputs
from .shared_caches import lent_states, shared_states

ACTIONS = ("physical_delete", "compact_route", "compact_route_stagewise")
POSITIONS = ("original", "contiguous")


class ActiveRows:
    """The active rows of a stage: all text and the kept visual tokens.

    Gathers the stream and every sequence tensor that the stage's layers read, in one call.

    Args:
        renumbered: sequence tensors of which the first S' rows are taken, whichever rows are active.
        source: what `stream` runs on; None for all rows.

    Attributes:
        stream: compact residual stream, ``[B, S', d]``.
        length: S'.
        fakes: see `TokenSet`.
        masks: see `TokenSet`.
        lent: keys and values that layers share, and what stands for them on these rows.
    """

    def __init__(
        self,
        edit: Editor,
        decision: Decision,
        layers: Sequence[Layer],
        stream: fx.Node,
        renumbered: set[fx.Node],
        source: "ActiveRows | None" = None,
    ) -> None:
        self.positions, self.source, self.renumbered = decision.positions, source, renumbered
        self.fakes: dict[Any, torch.Tensor] = {}
        tensors = [tensor for tensor in sequence_inputs(layers) if tensor not in renumbered]
        _, length = (expression(size) for size in shape(layers[0].start)[:2])
        dims = [sequence_dims(tensor, length)[0] for tensor in tensors]
        outer = [source.rows(edit, t, d) if source else t for t, d in zip(tensors, dims, strict=True)]
        edit.region = f"compact.{decision.layer}"
        self.stream, *rows = compact(edit, [stream, *outer], self.positions, [1, *dims])
        self.length = edit.size(self.stream, 1)
        self.gathered = dict(zip(tensors, rows, strict=True))
        for tensor in (tensor for tensor in sequence_inputs(layers) if tensor in renumbered):
            self.rows(edit, tensor, sequence_dims(tensor, length)[0])
        self.lent: dict[fx.Node, fx.Node] = {}
        for states in (states for layer in layers for states in _from_before(layer, layers[0])):
            self.shared(edit, states)
        self.masks: dict[fx.Node, fx.Node] = {}
        if edit.graph.token_index in self.gathered:
            self._make_masks(edit, decision, layers, edit.size(stream, 1))

    def _make_masks(self, edit: Editor, decision: Decision, layers: Sequence[Layer], length: fx.Node) -> None:
        """Masks of the layers, and the token index that they and later stages come from.

        Behind the tokens of a row that has fewer it is beyond all: no token sees what is there.
        """
        index = edit.graph.token_index
        assert index is not None
        is_none = edit.call(aten.ge.Scalar, self.positions, length)
        self.gathered[index] = edit.call(aten.masked_fill.Scalar, self.gathered[index], is_none, NO_TOKEN)
        if any(edit.graph.reaches[layer.index].counts_tokens for layer in layers):
            edit.graph.stage_indices[decision.layer] = self.gathered[index]
        replay = _replay(edit, layers[0], (), {}, self)
        attending = [layer for layer in layers if not edit.graph.reaches[layer.index].state]
        for mask in dict.fromkeys(attention_arguments(layer.attention).mask for layer in attending):
            if mask is not None:
                self.masks[mask] = replay(mask)

    def rows(self, edit: Editor, tensor: fx.Node, dim: int) -> fx.Node:
        if tensor not in self.gathered:
            outer = self.source.rows(edit, tensor, dim) if self.source else tensor
            if tensor in self.renumbered:
                rows = edit.call(aten.slice.Tensor, outer, dim, 0, self.length)
                rows = edit.call(aten.clone.default, rows, memory_format=torch.contiguous_format)
            else:
                (rows,) = compact(edit, [outer], self.positions, [dim])
            self.gathered[tensor] = rows
        return self.gathered[tensor]

    def shared(self, edit: Editor, states: fx.Node) -> fx.Node:
        if states not in self.lent:
            outer = self.source.shared(edit, states) if self.source else states
            self.lent[states] = compact_heads(edit, outer, self.positions)
        return self.lent[states]


def _from_before(layer: Layer, first: Layer) -> tuple[fx.Node, ...]:
    """Keys and values of a layer before `first` with which `layer` attends."""
    is_before = layer.source is not None and layer.source < first.index
    return shared_states(layer) if is_before else ()


class RouteStages(Pass):
    """Args:
    action: one of `ACTIONS`.
    positions: one of `POSITIONS`.
    keep_streams: restore the input of every layer and keep it in `ModelGraph.streams`.
    """

    requires = ("layers", "decisions")
    provides = ("stages",)
    excludes = ("stages", "outputs")

    def __init__(self, action: str, positions: str = "original", keep_streams: bool = False) -> None:
        self.action, self.positions, self.keep_streams = action, positions, keep_streams

    def apply(self, graph: ModelGraph) -> PassResult:
        renumbered = descendants(position_input(graph)) if self.positions == "contiguous" else set()
        if renumbered:
            _refuse_shared_positions(graph)
        if self.action == "physical_delete":
            streams = _delete(graph, renumbered, self.keep_streams)
        else:
            stagewise = self.action == "compact_route_stagewise"
            streams = _route(graph, renumbered, stagewise, self.keep_streams)
        if self.keep_streams:
            graph.streams = tuple(streams.get(layer.start, layer.start) for layer in graph.layers)
        routed = len(graph.layers) - graph.decisions[0].layer
        return PassResult(self.name, matched=len(graph.decisions), rewritten=routed, detail=self.action)


def _refuse_shared_positions(graph: ModelGraph) -> None:
    """Keys that are rotated once can't be counted anew in each stage that reads them."""
    for _, layers in _stages(graph):
        crossing = next((layer for layer in layers if _from_before(layer, layers[0])), None)
        if crossing is not None:
            raise MatchError(
                f"Layer {crossing.index} attends with keys of layer {crossing.source}, which lies in an earlier stage "
                f"and rotated them by its positions; expected positions 'original' for a decoder whose layers share "
                f"their caches."
            )


def _stages(graph: ModelGraph) -> list[tuple[Decision, tuple[Layer, ...]]]:
    ends = [d.layer for d in graph.decisions[1:]] + [len(graph.layers)]
    return [(d, graph.layers[d.layer : end]) for d, end in zip(graph.decisions, ends, strict=True)]


def _route(
    graph: ModelGraph, renumbered: set[fx.Node], stagewise: bool, keep_streams: bool
) -> dict[fx.Node, fx.Node]:
    """Returns what stands in the place of streams between layers."""
    restored = {}
    wanted = {layer.start for layer in graph.layers if keep_streams}
    wanted |= {decision.scoring_layer.start for decision in graph.decisions}
    lent = _lent_to_later_stages(graph)
    wanted |= {graph.layers[index].start for index in lent}
    for decision, layers in _stages(graph):
        tokens: ActiveRows | None = None
        for group in [layers] if stagewise else [(layer,) for layer in layers]:
            start, last = group[0].start, group[-1]
            with edit_after(graph, last.end, region=f"compact.{group[0].index}") as edit:
                if tokens is None:
                    tokens = ActiveRows(edit, decision, layers, start, renumbered)
                    stream = tokens.stream
                else:
                    (stream,) = compact(edit, [start], tokens.positions, [1])
                _, *inside, stream = _run_layers(edit, group, stream, tokens)
                for layer, rows in zip(group[1:], inside, strict=True):
                    if layer.start in wanted:
                        passed = group[: layer.index - group[0].index]
                        restored[layer.start] = _restore(edit, _waiting(edit, start, passed), rows, tokens)
                for layer in (layer for layer in group if layer.index in lent):
                    restored |= _lend(edit, layer, lent[layer.index], restored.get(layer.start, start))
                restored[last.end] = _restore(edit, _waiting(edit, start, group), stream, tokens)
    for original, stream in restored.items():
        original.replace_all_uses_with(stream, partial(operator.lt, stream))  # only what comes later
    return restored


def _lent_to_later_stages(graph: ModelGraph) -> dict[int, tuple[fx.Node, ...]]:
    """Keys and values of layers of the stages that layers of later stages read, by the number of the layer."""
    found: dict[int, tuple[fx.Node, ...]] = {}
    for _, layers in _stages(graph):
        later = graph.layers[layers[-1].index + 1 :]
        found |= {layer.index: states for layer in layers if (states := lent_states(layer, later))}
    return found


def _lend(edit: Editor, layer: Layer, states: tuple[fx.Node, ...], stream: fx.Node) -> dict[fx.Node, fx.Node]:
    """Keys and values of a layer for all rows of its input `stream`, by what they are in the graph."""
    needed = ancestors(states, stop=layer.start)
    batch, length = (expression(size) for size in shape(layer.start)[:2])
    replay = Replay(edit, AllRows({}), length, batch, {layer.start: stream})
    replay.run(node for node in layer.nodes if node in needed)
    return {node: replay(node) for node in states}


def _waiting(edit: Editor, stream: fx.Node, layers: Sequence[Layer]) -> fx.Node:
    """The stream of tokens that wait while `layers` run."""
    for addend in (addend for layer in layers for addend in layer.addends):
        stream = edit.call(aten.add.Tensor, stream, addend)
    return stream


def _delete(graph: ModelGraph, renumbered: set[fx.Node], keep_streams: bool) -> dict[fx.Node, fx.Node]:
    """Returns what stands in the place of streams between layers, if they are to be kept."""
    last = graph.layers[-1].end
    stream = graph.layers[graph.decisions[0].layer].start
    before_last = stream
    stages: list[tuple[fx.Node, ActiveRows]] = []
    decisions: list[Decision] = []
    kept: dict[fx.Node, fx.Node] = {}
    with edit_after(graph, last, region="") as edit:
        for decision, layers in _stages(graph):
            source = stages[-1][1] if stages else None
            if source is not None:
                scoring_input = stream if decision.scoring_layer is layers[0] else before_last
                decision = _decide_again(edit, decision, scoring_input, decisions[-1], source)
            decisions.append(decision)
            tokens = ActiveRows(edit, decision, layers, stream, renumbered, source)
            stages.append((stream, tokens))
            *before, stream = _run_layers(edit, layers, tokens.stream, tokens)
            before_last = before[-1]
            if keep_streams:
                kept |= {
                    layer.start: _restore_all(edit, rows, stages)
                    for layer, rows in zip(layers, before, strict=True)
                }
        stream = _restore_all(edit, stream, stages)
    last.replace_all_uses_with(stream)
    graph.decisions = tuple(decisions)
    return kept


def _run_layers(edit: Editor, layers: Sequence[Layer], stream: fx.Node, tokens: ActiveRows) -> list[fx.Node]:
    """Replay `layers` on the compact stream and return it before and after each of them."""
    streams = [stream]
    for layer in layers:
        edit.region = f"layer.{layer.index}"
        replay = _replay(edit, layer, layer.nodes, {layer.start: streams[-1]}, tokens)
        tokens.lent |= {states: replay(states) for states in lent_states(layer, edit.graph.layers)}
        streams.append(replay(layer.end))
    edit.region = f"restore.{layers[-1].index}"
    return streams


def _replay(
    edit: Editor, layer: Layer, nodes: Sequence[fx.Node], mapping: dict[fx.Node, fx.Node], tokens: ActiveRows
) -> Replay:
    batch, length = (expression(size) for size in shape(layer.start)[:2])
    replay = Replay(edit, tokens, length, batch, mapping)
    replay.run(nodes)
    return replay


def _decide_again(
    edit: Editor, decision: Decision, stream: fx.Node, previous: Decision, tokens: ActiveRows
) -> Decision:
    """Score and select among the survivors of the previous decision, on their compact stream."""
    edit.region = f"decision.{decision.layer}"
    visual_index, lengths = _survivors(edit, previous)
    mapping = {
        decision.scoring_layer.start: stream,
        decision.visual_index: visual_index,
        decision.lengths: lengths,
    }
    if decision.text_index is not None:
        # All that was deleted stands before it.
        fewer = edit.call(aten.sub.Tensor, decision.lengths, lengths)
        behind = edit.call(aten.unsqueeze.default, fewer, 1)
        mapping[decision.text_index] = edit.call(aten.sub.Tensor, decision.text_index, behind)
    copies = _replay(edit, decision.scoring_layer, decision.nodes, mapping, tokens)
    return Decision(
        decision.layer,
        decision.scoring_layer,
        visual_index,
        lengths,
        scores=copies(decision.scores),
        positions=copies(decision.positions),
        kept=copies(decision.kept),
        nodes=(),
    )


def _survivors(edit: Editor, decision: Decision) -> tuple[fx.Node, fx.Node]:
    """Positions of the visual tokens in the compact stream, the dropped ones past its end, and its lengths.

    A kept token moves forward by as many places as visual tokens before it were dropped.
    """
    index, kept = decision.visual_index, decision.kept
    is_token = edit.call(aten.lt.Tensor, index, edit.call(aten.unsqueeze.default, decision.lengths, 1))
    dropped = edit.call(aten.logical_and.default, is_token, edit.call(aten.logical_not.default, kept))
    moved = edit.call(aten.sub.Tensor, index, edit.call(aten.cumsum.default, dropped, 1))
    survivors = edit.call(aten.masked_fill.Scalar, moved, edit.call(aten.logical_not.default, kept), NO_TOKEN)
    lengths = edit.call(aten.sub.Tensor, decision.lengths, edit.call(aten.sum.dim_IntList, dropped, [1]))
    return survivors, lengths


def _restore_all(edit: Editor, rows: fx.Node, stages: Sequence[tuple[fx.Node, ActiveRows]]) -> fx.Node:
    """The rows of the last stage in the stream that the first one began with."""
    for outer, tokens in reversed(stages):
        rows = _restore(edit, outer, rows, tokens)
    return rows


def _restore(edit: Editor, stream: fx.Node, rows: fx.Node, tokens: ActiveRows) -> fx.Node:
    return edit.call(torch.ops.reroute.restore_tokens.default, stream, rows, tokens.positions)
