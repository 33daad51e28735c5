"""Score and select the visual tokens before each decision layer.

Before: ``%h -> layer 7 -> ...``
After:  ``%query = last row of layer 7's rotated query``, ``%keys = layer 7's rotated keys of %h``,
        ``%scores = reroute.visual_scores(%query, %keys, %visual_index)``,
        ``%positions, %selected = reroute.select_tokens(%scores, %visual_index, %keep, S)``.
        The layers themselves are as before; `RouteStages` makes them use the selection.

The query and the keys are partial replays of the layer on its own input: the layer's own norm,
projections and rotary positions (Reroute, arXiv 2606.12412, section 3). `visual_index [B, N]` becomes
an input of the graph. ``keep = max(1, int(N * ratio))`` is symbolic: every later shape follows from the
shapes of the inputs.
"""

import operator
from collections.abc import Sequence

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic

from .canonicalize_attention import attention_arguments
from .decoder_graph import Decision, DecoderGraph, Layer
from .errors import MatchError
from .graph_edit import Editor, ancestors, edit_after, expression, shape, value
from .interface import Pass, PassResult
from .replay import AllRows, LastRow, Replay


class InsertSelection(Pass):
    """Args:
    decision_layers: ascending layer indices.
    keep_ratios: one ratio in (0, 1] for each.
    """

    def __init__(self, decision_layers: Sequence[int], keep_ratios: Sequence[float]) -> None:
        self.decisions = tuple(zip(decision_layers, keep_ratios, strict=True))

    def apply(self, graph: DecoderGraph) -> PassResult:
        if not self.decisions:
            return PassResult(self.name)
        deepest, found = self.decisions[-1][0], len(graph.layers)
        if deepest >= found:
            raise MatchError(
                f"decision_layers has {deepest}, but the graph has {found} layers; expected 1..{found - 1}."
            )
        graph.visual_index = _add_visual_index(graph)
        count = _visual_count(graph, graph.visual_index)
        graph.decisions = tuple(
            _insert(graph, graph.layers[index], count, ratio) for index, ratio in self.decisions
        )
        done = len(graph.decisions)
        return PassResult(self.name, matched=done, rewritten=done)


def _add_visual_index(graph: DecoderGraph) -> fx.Node:
    """New graph input ``visual_index [B, N]`` int64, N a symbol of its own."""
    start = graph.layers[0].start
    batch, length = value(start).shape[:2]
    env = graph.fake_mode.shape_env
    assert env is not None
    # The hint only steers size-1 specialisation; it has to be an ordinary number of visual tokens.
    hint = max(2, int(length.node.hint) * 3 // 4)
    source = ConstantSource(f"visual_index_{len(env.var_to_range)}")
    symbol = env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
    tokens = env.create_symintnode(symbol, hint=hint, source=source)
    with graph.fx_graph.inserting_before(graph.inputs[-1].next):
        node = graph.fx_graph.placeholder("visual_index")
    with graph.fake_mode:
        node.meta["val"] = torch.empty((batch, tokens), dtype=torch.int64, device=value(start).device)
    return node


def _visual_count(graph: DecoderGraph, visual_index: fx.Node) -> fx.Node:
    with edit_after(graph, visual_index, region="") as edit:
        return edit.size(visual_index, 1)


def _insert(graph: DecoderGraph, layer: Layer, count: fx.Node, ratio: float) -> Decision:
    attention = attention_arguments(layer.attention)
    with edit_after(graph, layer.attention.prev, region=f"decision.{layer.index}") as edit:
        query = _replay(edit, layer, attention.query, last_row=True)
        keys = _replay(edit, layer, attention.key, last_row=False)
        index = graph.visual_index
        assert index is not None
        scores = edit.call(torch.ops.reroute.visual_scores.default, query, keys, index, attention.scale)
        keep = _keep_count(edit, count, ratio)
        length = edit.size(layer.start, 1)
        choice = edit.call(torch.ops.reroute.select_tokens.default, scores, index, keep, length)
        positions, selected = edit.unpack(choice)
    return Decision(layer.index, index, scores, positions, selected, tuple(edit.emitted))


def _keep_count(edit: Editor, count: fx.Node, ratio: float) -> fx.Node:
    """``max(1, int(N * ratio))`` in the double precision of Python."""
    exact = edit.call(operator.mul, edit.call(torch.sym_float, count), ratio)
    return edit.call(torch.sym_max, 1, edit.call(torch.sym_int, exact))


def _replay(edit: Editor, layer: Layer, target: fx.Node, *, last_row: bool) -> fx.Node:
    """Compute `target` of a layer on all rows of its input, or on the last row."""
    batch, length = (expression(size) for size in shape(layer.start)[:2])
    needed = ancestors([target], stop=layer.start)
    tokens: AllRows | LastRow = LastRow() if last_row else AllRows()
    stream = tokens.rows(edit, layer.start, 1)
    replay = Replay(edit, tokens, length, batch, {layer.start: stream})
    replay.run(node for node in layer.nodes if node in needed)
    counterpart: fx.Node = replay(target)
    return counterpart
