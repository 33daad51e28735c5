"""Score and select the visual tokens before each decision layer.

Before: ``%h -> layer 7 -> ...``
After:  ``%query = layer 7's rotated query of each row's last token``, ``%keys = layer 7's rotated keys of %h``,
        ``%scores = reroute.visual_scores(%query, %keys, %visual_index, %lengths)``, with attention sinks a key
        for them in front, with a soft cap the same in plain operators,
        ``%positions, %kept = reroute.select_tokens(%scores, %visual_index, %lengths, %keep_7, ...)``.
        The layers themselves are as before; `RouteStages` makes them use the selection.

A decision before a layer with a state asks the nearest layer with an attention, on the stream as it is there.

What a ranking rule is given are partial replays of the layer on its own input: the layer's own norm, projections and
rotary positions (Reroute, arXiv 2606.12412, section 3), or those of the layer before on its input. Without rotary
positions means that all of them are 0. Another ranking rule than attention is traced, and its nodes take the place of
``visual_scores``; what it doesn't use is not replayed.

Inputs of the graph that are added, all but the first two for each decision layer: ``visual_index [B, N]``,
``lengths [B]``, with several pools ``pools [B, N]``, ``keep_7 [B, N]`` and ``slots_7 [S']``, of which only the
size is read. See the operators for what they mean. The tokens that ``always [B, N]`` marks are kept by the first
decisions, as many as are told, whatever their scores, which are returned as they are. Rules may ask for
``text_index [B, T]``, ``rows [B, N]``, ``columns [B, N]`` and ``images [B, N]``: see `Candidates`. How many tokens are
kept is known from the prompt alone, so every shape is known before the program runs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .base_errors import MatchError
from .base_pass import Pass, PassResult
from .candidate_nodes import AskedInputs, projections
from .canonicalize_attention import attention_arguments
from .emit_traced import emit
from .graph_edit import (
    Editor,
    add_input,
    ancestors,
    aten,
    edit_after,
    expression,
    is_op,
    shape,
    value,
)
from .model_graph import Decision, Layer, ModelGraph
from .ranking import Candidates, Rank, by_attention
from .tensor_names import (
    ALWAYS,
    LENGTHS,
    POOLS,
    TEXT_INDEX,
    VISUAL_INDEX,
    VISUAL_TOKENS,
    keep_input,
    slots_input,
)

SCORING = ("own", "previous")


class InsertSelection(Pass):
    """Args:
    decision_layers: ascending layer indices.
    several_pools: whether a row's visual tokens compete in several pools, one for each image.
    ranks: for each decision its ranking rule; attention if there are none.
    scoring: for each decision whose attention its rule is given, one of `SCORING`; the layer's own if there are none.
    seed: for rules that choose by chance.
    always: how many decisions, from the first, keep the tokens that an input marks.
    """

    requires = ("layers",)
    provides = ("decisions",)
    excludes = ("decisions", "numbered stages", "caches", "outputs")

    def __init__(
        self,
        decision_layers: Sequence[int],
        several_pools: bool = False,
        ranks: Sequence[Rank] = (),
        scoring: Sequence[str] = (),
        seed: int = 0,
        always: int = 0,
    ) -> None:
        self.decision_layers = tuple(decision_layers)
        self.several_pools = several_pools
        self.ranks = tuple(ranks) or (by_attention,) * len(self.decision_layers)
        self.scoring = tuple(scoring) or (SCORING[0],) * len(self.decision_layers)
        self.seed, self.always = seed, always

    def apply(self, graph: ModelGraph) -> PassResult:
        if not self.decision_layers:
            raise MatchError(
                "decision_layers is empty; expected at least one. Leave the pass out to route nothing."
            )
        deepest, found = self.decision_layers[-1], len(graph.layers)
        if deepest >= found:
            raise MatchError(
                f"decision_layers has {deepest}, but the graph has {found} layers; expected 1..{found - 1}."
            )
        batch = value(graph.layers[0].start).shape[0]
        visual_index = add_input(graph, VISUAL_INDEX, (batch, VISUAL_TOKENS), torch.int64)
        lengths = add_input(graph, LENGTHS, (batch,), torch.int64)
        pools = None
        if self.several_pools:
            pools = add_input(graph, POOLS, (batch, VISUAL_TOKENS), torch.int64)
        always = None
        if self.always:
            always = add_input(graph, ALWAYS, (batch, VISUAL_TOKENS), torch.bool)
        # All inputs stand before the first decision that is inserted.
        inputs = [
            (
                add_input(graph, keep_input(index), (batch, VISUAL_TOKENS), torch.bool),
                add_input(graph, slots_input(index), (slots_input(index),), torch.bool),
            )
            for index in self.decision_layers
        ]
        asked = AskedInputs(graph)
        chosen = zip(self.decision_layers, self.ranks, self.scoring, inputs, strict=True)
        graph.decisions = tuple(
            self._insert(
                asked,
                graph.layers[index],
                rank,
                SCORING.index(whose),
                visual_index,
                lengths,
                keep,
                pools,
                always if number < self.always else None,
                slots,
            )
            for number, (index, rank, whose, (keep, slots)) in enumerate(chosen)
        )
        asked.finish()
        done = len(graph.decisions)
        return PassResult(self.name, matched=done, rewritten=done)

    def _insert(
        self,
        asked: AskedInputs,
        layer: Layer,
        rank: Rank,
        distance: int,
        visual_index: fx.Node,
        lengths: fx.Node,
        keep: fx.Node,
        pools: fx.Node | None,
        always: fx.Node | None,
        slots: fx.Node,
    ) -> Decision:
        graph = asked.graph
        scoring_layer = graph.layers[layer.index - distance]
        asked_layer = _nearest_attention(graph, scoring_layer)
        attention = attention_arguments(asked_layer.attention)
        with edit_after(graph, layer.attention.prev, region=f"decision.{layer.index}") as edit:
            candidates = {
                "hidden": scoring_layer.start,
                "visual_index": visual_index,
                "lengths": lengths,
                "keep": keep,
                "pools": pools,
                "layer": layer.index,
                "seed": self.seed,
                "scale": attention.scale,
                "sinks": attention.sinks,
                "softcap": attention.softcap,
                **asked.tokens(),
                **projections(edit, asked, asked_layer, lengths, scoring_layer.start),
            }
            scores = _score(edit, rank, candidates)
            ranked = scores
            if always is not None:
                ranked = edit.call(aten.masked_fill.Scalar, scores, always, torch.inf)
            sizes = edit.size(scoring_layer.start, 1), edit.size(slots, 0)
            selection = torch.ops.reroute.select_tokens.default
            choice = edit.call(selection, ranked, visual_index, lengths, keep, pools, *sizes)
            positions, kept = edit.unpack(choice)
        # What the ranking rule has no use for is dead code.
        needed = ancestors([scores, positions, kept])
        nodes = tuple(node for node in edit.emitted if node in needed)
        text_index = asked.made.get(TEXT_INDEX)
        return Decision(
            layer.index,
            scoring_layer,
            visual_index,
            lengths,
            scores,
            positions,
            kept,
            nodes,
            text_index if text_index in needed else None,
        )


def _nearest_attention(graph: ModelGraph, layer: Layer) -> Layer:
    """That layer, or if it has a state in the place of an attention the nearest that has one, of two the later."""
    attending = [each for each in graph.layers if not graph.reaches[each.index].state]
    return min(reversed(attending), key=lambda each: abs(each.index - layer.index))


def _score(edit: Editor, rank: Rank, candidates: dict[str, Any]) -> fx.Node:
    """Scores ``[B, N]`` float32 by a ranking rule, -inf where there is no token."""
    name = f"The ranking rule {getattr(rank, '__name__', rank)!s}"
    scores, *more = emit(edit, name, lambda **given: rank(Candidates(**given)), candidates)
    if more:
        raise MatchError(
            f"{name} returned {1 + len(more)} tensors; expected one tensor, a score for each candidate."
        )
    if is_op(scores, torch.ops.reroute.visual_scores):
        return scores
    index, fake = candidates["visual_index"], value(scores)
    if not fake.is_floating_point() or [*map(expression, fake.shape)] != [*map(expression, shape(index))]:
        raise MatchError(
            f"{name} returned {fake.dtype} of shape {list(fake.shape)}; expected a score for each candidate, floating "
            f"point of shape {list(shape(index))}."
        )
    no_token = edit.call(aten.ge.Tensor, index, edit.call(aten.unsqueeze.default, candidates["lengths"], 1))
    scores = edit.call(aten.to.dtype, scores, torch.float32)
    return edit.call(aten.masked_fill.Scalar, scores, no_token, -torch.inf)
