"""Let attention read a key-value cache: new tokens see what their row cached before, and each other.

Before: ``attention(%query, %key, %value, None, causal)`` on Q tokens that are a sequence of their own
After:  ``%keys = index_put_(%key_cache_7, [row, :, slot], %key)``, the same for the values, and
        ``attention(%query, %keys, %values, slot number <= own slot)``

Layers of a stage cache the same tokens; stages differ. Inputs that are added, for each stage and named after
its first layer: ``cached_7 [B]`` int64, the tokens that each row has in the cache; for each layer:
``key_cache_7`` and ``value_cache_7`` ``[B, Hkv, C, D]``, which the program writes into. New tokens go behind
those of their row, so C has to be at least Q more than ``cached_7``. What lies behind them is never read.

Four layers of a stage become one region: a step is short, and every region that is compiled apart costs 0.15 ms
on CPU (measured: 1.13 times a graph compiled as a whole, joined 1.04 times; 32 layers of width 1024).

Outside attention nothing may depend on earlier tokens or on their number: a graph that counts its own positions
or sums over tokens is refused.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import fx

from .base_errors import MatchError
from .base_pass import Pass, PassResult, Rejection, refuse
from .canonicalize_attention import attention_arguments, change_attention
from .graph_edit import (
    Editor,
    add_input,
    aten,
    edit_after,
    expression,
    is_tensor,
    sequence_dims,
    shape,
    value,
)
from .model_graph import Layer, ModelGraph
from .tensor_names import CACHED, cache_input, cached_input, capacity_size
from .token_mixing import TokenMixing, numbers_tokens

LAYERS_PER_REGION = 4


class AttendToCache(Pass):
    """Args:
    stage_starts: first layers of the stages, ascending; the layers before the first are a stage too.
    """

    requires = ("layers",)
    provides = ("caches",)
    excludes = ("caches", "decisions", "outputs")

    def __init__(self, stage_starts: Sequence[int] = ()) -> None:
        self.starts = (0, *stage_starts)

    def apply(self, graph: ModelGraph) -> PassResult:
        deepest, found = self.starts[-1], len(graph.layers)
        if deepest >= found:
            raise MatchError(
                f"stage_starts has {deepest}, but the graph has {found} layers; expected 1..{found - 1}."
            )
        if any(a >= b for a, b in pairwise(self.starts)):
            raise MatchError(f"stage_starts is {list(self.starts[1:])}; expected ascending layers above 0.")
        rejected = tuple(_what_depends_on_earlier_tokens(graph))
        if rejected:
            raise refuse(
                f"{len(rejected)} calls outside attention depend on earlier tokens",
                "a decoder in which new tokens know earlier ones by attention and position_ids alone",
                rejected,
            )
        ends = (*self.starts[1:], found)
        stages = [graph.layers[a:b] for a, b in zip(self.starts, ends, strict=True)]
        inputs = [_add_inputs(graph, stage) for stage in stages]
        stream = graph.layers[0].start
        before = graph.inputs[-1] if stream.op == "placeholder" else stream
        for stage, (cached, caches) in zip(stages, inputs, strict=True):
            with edit_after(graph, before, region=f"slots.{stage[0].index}") as edit:
                places = _Slots(edit, cached, caches[0][0], stream)
            for layer, (keys, values) in zip(stage, caches, strict=True):
                _attend(graph, layer, keys, values, places)
            _join_regions(graph, stage)
        return PassResult(self.name, matched=found, rewritten=found, detail=f"{len(stages)} stages")


def _join_regions(graph: ModelGraph, stage: Sequence[Layer]) -> None:
    """Name the regions of each four layers of a stage alike."""
    names: dict[str | None, str] = {}
    for first in range(0, len(stage) - LAYERS_PER_REGION + 1, LAYERS_PER_REGION):
        group = [layer.index for layer in stage[first : first + LAYERS_PER_REGION]]
        names |= {f"layer.{index}": f"layer.{group[0]}-{group[-1]}" for index in group}
    for node in graph.fx_graph.nodes:
        region = node.meta.get("region")
        node.meta["region"] = names.get(region, region)


def _what_depends_on_earlier_tokens(graph: ModelGraph) -> Iterator[Rejection]:
    length = expression(shape(graph.layers[0].start)[1])
    mixing = TokenMixing(graph.fx_graph.nodes, graph.layers[0].start)
    for node in graph.fx_graph.nodes:
        if node in mixing.reasons:
            yield Rejection(node.name, mixing.reasons[node])
        elif node.op != "call_function" or not is_tensor(node):
            continue
        elif numbers_tokens(node, length) or (sequence_dims(node, length) and _reads_sizes_alone(node)):
            yield Rejection(node.name, f"it numbers the tokens from the first of a call ({node.target})")


def _reads_sizes_alone(node: fx.Node) -> bool:
    return all(isinstance(value(n), torch.SymInt) for n in node.all_input_nodes)


def _add_inputs(graph: ModelGraph, stage: Sequence[Layer]) -> tuple[fx.Node, list[tuple[fx.Node, ...]]]:
    first = stage[0].index
    cached = add_input(graph, cached_input(first), shape(stage[0].start)[:1], torch.int64)
    caches = []
    for layer in stage:
        given = attention_arguments(layer.attention)
        pair = []
        for kind, new in zip(CACHED, (given.key, given.value), strict=True):
            batch, heads, _, width = shape(new)
            size = (batch, heads, capacity_size(first), width)
            pair.append(add_input(graph, cache_input(kind, layer.index), size, value(new).dtype))
        caches.append(tuple(pair))
    return cached, caches


class _Slots:
    """Where the new tokens of a stage go in its caches and what they see there.

    Attributes:
        row: ``[B, 1]``.
        slot: ``[B, Q]``.
        mask: ``[B, 1, Q, C]`` bool.
    """

    def __init__(self, edit: Editor, cached: fx.Node, cache: fx.Node, stream: fx.Node) -> None:
        def count(size: fx.Node) -> fx.Node:
            return edit.call(aten.arange.default, size, device=value(cached).device)

        def unsqueeze(node: fx.Node, dim: int) -> fx.Node:
            return edit.call(aten.unsqueeze.default, node, dim)

        self.row = unsqueeze(count(edit.size(stream, 0)), 1)
        self.slot = edit.call(aten.add.Tensor, unsqueeze(cached, 1), count(edit.size(stream, 1)))
        own = unsqueeze(unsqueeze(self.slot, 1), 3)  # [B, 1, Q, 1]
        self.mask = edit.call(aten.le.Tensor, count(edit.size(cache, 2)), own)


def _attend(graph: ModelGraph, layer: Layer, keys: fx.Node, values: fx.Node, slots: _Slots) -> None:
    given = attention_arguments(layer.attention)
    with edit_after(graph, layer.attention.prev, region=f"layer.{layer.index}") as edit:
        keys, values = (
            edit.call(
                aten.index_put_.default,
                cache,
                [slots.row, None, slots.slot],
                edit.call(aten.transpose.int, new, 1, 2),
            )
            for cache, new in ((keys, given.key), (values, given.value))
        )
    change_attention(layer.attention, key=keys, value=values, mask=slots.mask, is_causal=False)
