"""Nodes of what a ranking rule is given, made when it uses them: see `Candidates`.

Queries, keys and values are partial replays of a layer on its own input. Without rotary positions means that the tables
which the layer reads are computed anew for positions that are all 0.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from .base_errors import MatchError
from .canonicalize_attention import attention_arguments
from .emit_traced import Later
from .graph_edit import (
    Editor,
    add_input,
    ancestors,
    aten,
    descendants,
    edit_after,
    expression,
    memory_order,
    new_size,
    shape,
    value,
)
from .model_graph import Layer, ModelGraph
from .number_stages import position_input
from .replay import AllRows, ChosenTokens, Replay, TokenSet, last_tokens
from .tensor_names import CELLS, TEXT_INDEX, TEXT_TOKENS, VISUAL_TOKENS


class AskedInputs:
    """Inputs that are added, and rotary tables that are computed, when a ranking rule first asks for them.

    Attributes:
        made: inputs by name.
    """

    def __init__(self, graph: ModelGraph) -> None:
        self.graph = graph
        self.made: dict[str, fx.Node] = {}
        self._unrotated: dict[tuple[fx.Node, ...], dict[fx.Node, fx.Node]] = {}

    def tokens(self) -> dict[str, Later]:
        """Inputs that say something of each token, by their names in `Candidates`."""
        batch = value(self.graph.layers[0].start).shape[0]
        sizes = {TEXT_INDEX: TEXT_TOKENS} | dict.fromkeys(CELLS, VISUAL_TOKENS)
        return {name: self._later(name, (batch, new_size(self.graph, size))) for name, size in sizes.items()}

    def _later(self, name: str, size: Sequence[Any]) -> Later:
        return Later(_empty(self.graph, size, torch.int64), lambda: self.input(name, size))

    def input(self, name: str, size: Sequence[Any]) -> fx.Node:
        if name not in self.made:
            self.made[name] = add_input(self.graph, name, size, torch.int64)
        return self.made[name]

    def text_index(self) -> fx.Node:
        return self.input(TEXT_INDEX, (value(self.graph.layers[0].start).shape[0], TEXT_TOKENS))

    def unrotated(self, layer: Layer) -> dict[fx.Node, fx.Node]:
        """What a layer reads of rotary positions, computed for positions that are all 0."""
        given, inside = position_input(self.graph), {layer.start, *layer.nodes}
        read = {source for node in layer.nodes for source in node.all_input_nodes if source not in inside}
        rotary = ancestors(read) & descendants(given)
        computed = tuple(node for node in self.graph.fx_graph.nodes if node in rotary)
        if computed and computed not in self._unrotated:
            last = self.graph.inputs[-1] if computed[-1] is given else computed[-1]
            with edit_after(self.graph, last, region="unrotated") as edit:
                zeros = edit.call(aten.zeros_like.default, given)
                self._unrotated[computed] = edit.copy_all(computed[1:], {given: zeros})
        return self._unrotated.get(computed, {})

    def finish(self) -> None:
        """Forget sizes that no input brought in."""
        if TEXT_INDEX not in self.made:
            self.graph.new_sizes.pop(TEXT_TOKENS, None)


def projections(
    edit: Editor, asked: AskedInputs, layer: Layer, lengths: fx.Node, stream: fx.Node
) -> dict[str, Later]:
    """Queries, keys and values of a layer by their names in `Candidates`, of a stream ``[B, S, d]``: its own, say."""
    attention = attention_arguments(layer.attention)
    text_tokens = new_size(edit.graph, TEXT_TOKENS)

    def projection(target: fx.Node, count: Any, make_tokens: Callable[[], TokenSet]) -> Later:
        size = shape(target)
        sizes = (*size[:2], size[2] if count is None else count, size[3])
        # As the layer's own lie in memory.
        order = memory_order(value(target))
        fake = _empty(edit.graph, [sizes[dim] for dim in order], value(target).dtype)
        with edit.graph.fake_mode:
            fake = fake.permute([order.index(dim) for dim in range(4)])
        return Later(fake, lambda: _partial_replay(edit, layer, target, make_tokens(), stream))

    def last(rotary: bool) -> TokenSet:
        return last_tokens(edit, lengths, {} if rotary else asked.unrotated(layer))

    def text(rotary: bool) -> TokenSet:
        index = asked.text_index()
        return ChosenTokens(index, edit.size(index, 1), {} if rotary else asked.unrotated(layer))

    def everything(rotary: bool) -> TokenSet:
        if layer.source is not None and not rotary:
            raise MatchError(
                f"The ranking rule asks for keys of layer {layer.index} without rotary positions, but that layer "
                f"attends with the rotated ones of layer {layer.source}; expected a rule that takes them as they are, "
                f"or a decision before a layer with keys of its own."
            )
        return AllRows({} if rotary else asked.unrotated(layer))

    found = {
        "values": projection(attention.value, None, lambda: everything(True)),
        "text_values": projection(attention.value, text_tokens, lambda: text(True)),
    }
    for prefix, rotary in (("", True), ("unrotated_", False)):
        found |= {
            f"{prefix}query": projection(attention.query, 1, partial(last, rotary)),
            f"{prefix}keys": projection(attention.key, None, partial(everything, rotary)),
            f"{prefix}text_queries": projection(attention.query, text_tokens, partial(text, rotary)),
        }
    return found


def _empty(graph: ModelGraph, size: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
    """A fake tensor on the device of the stream."""
    with graph.fake_mode:
        return torch.empty(size, dtype=dtype, device=value(graph.layers[0].start).device)


def _partial_replay(
    edit: Editor, layer: Layer, target: fx.Node, tokens: TokenSet, stream: fx.Node
) -> fx.Node:
    """Compute `target` of a layer on `tokens` of a stream."""
    batch, length = (expression(size) for size in shape(layer.start)[:2])
    needed = ancestors([target], stop=layer.start)
    replay = Replay(edit, tokens, length, batch, {layer.start: tokens.rows(edit, stream, 1)})
    replay.run(node for node in layer.nodes if node in needed)
    counterpart: fx.Node = replay(target)
    return counterpart
