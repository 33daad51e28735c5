"""Let attention read a key-value cache: new tokens see what their row cached before, and each other.

Before: ``attention(%query, %key, %value, None, causal)`` on Q tokens that are a sequence of their own
After:  ``%keys = index_put_(%key_cache_7, [row, :, slot], %key)``, the same for the values, and
        ``attention(%query, %keys, %values, slot number <= own slot)``

Layers of a stage cache the same tokens; stages differ. Inputs that are added, for each stage and named after
its first layer: ``cached_7 [B]`` int64, the tokens that each row has in the cache; for each layer:
``key_cache_7`` and ``value_cache_7`` ``[B, Hkv, C, D]``, which the program writes into. New tokens go behind
those of their row, so C has to be at least Q more than ``cached_7``. What lies behind them is never read. Layers of a
stage that share keys and values have one cache, that of the first of them.

Where layers have windows, slots have to be told apart by which tokens they hold. In the layers before the first stage
that is the slot's number. A later stage gets ``index_cache_7 [B, C]`` int64 as well, the places of its tokens among all
tokens of the row; those of new tokens, which follow from ``cached_0``, are written into it.

Layers with a state get ``key_cache_3`` and ``value_cache_3`` as they are exposed of a prompt, one for each of their
recurrences, begin with them and return those behind the new tokens under the same names as of a prompt: a call that
fails leaves the cache as it was. How many tokens of a row are new says ``new_tokens [B]`` int64.

Four layers of a stage become one region: a step is short, and every region that is compiled apart costs 0.15 ms
on CPU (measured: 1.13 times a graph compiled as a whole, joined 1.04 times; 32 layers of width 1024).

Outside attention nothing may depend on earlier tokens or on their number: a graph that counts its own positions
or sums over tokens is refused.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import fx

from .base_errors import MatchError
from .base_pass import Pass, PassResult, Rejection, refuse
from .canonicalize_attention import attention_arguments, change_attention
from .expose_outputs import expose_states
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
from .model_graph import Layer, ModelGraph, Reach
from .reach_masks import emit_mask
from .recurrences import carry, recurrences
from .shared_caches import cache_owners, sources
from .tensor_names import (
    CACHED,
    NEW_TOKENS,
    cache_input,
    cached_input,
    capacity_size,
    index_cache_input,
    output_name,
)
from .token_mixing import TokenMixing, numbers_tokens

LAYERS_PER_REGION = 4


class AttendToCache(Pass):
    """Args:
    stage_starts: first layers of the stages, ascending; the layers before the first are a stage too.
    """

    requires = ("layers",)
    provides = ("caches",)
    excludes = ("caches", "groups", "decisions", "outputs")

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
        _drop_masks(graph)
        rejected = tuple(_what_depends_on_earlier_tokens(graph))
        if rejected:
            raise refuse(
                f"{len(rejected)} calls outside attention depend on earlier tokens",
                "a decoder in which new tokens know earlier ones by attention and position_ids alone",
                rejected,
            )
        ends = (*self.starts[1:], found)
        stages = [graph.layers[a:b] for a, b in zip(self.starts, ends, strict=True)]
        _carry_states(graph)
        owners = cache_owners(sources(graph.layers), self.starts)
        inputs = [_add_inputs(graph, stage, owners) for stage in stages]
        stream = graph.layers[0].start
        before = graph.inputs[-1] if stream.op == "placeholder" else stream
        for stage, given in zip(stages, inputs, strict=True):
            with edit_after(graph, before, region=f"slots.{stage[0].index}") as edit:
                slots = (
                    _Slots(edit, given, inputs[0].cached, stream, _reaches(graph, stage))
                    if given.caches
                    else None
                )
            held: dict[int, tuple[fx.Node, fx.Node]] = {}
            for layer in _attending(graph, stage):
                assert slots is not None
                own = given.caches.get(layer.index)
                if own is not None:
                    held[owners[layer.index]] = _write(graph, layer, own, slots)
                _attend(graph, layer, held[owners[layer.index]], slots)
            _join_regions(graph, stage)
        return PassResult(self.name, matched=found, rewritten=found, detail=f"{len(stages)} stages")


def _attending(graph: ModelGraph, layers: Sequence[Layer]) -> list[Layer]:
    """Those with an attention."""
    return [layer for layer in layers if not graph.reaches[layer.index].state]


def _carry_states(graph: ModelGraph) -> None:
    """Let recurrences begin with what the cache holds, and return what they end with."""
    found = recurrences(graph.fx_graph.nodes)
    if not found:
        return
    new = add_input(graph, NEW_TOKENS, shape(graph.layers[0].start)[:1], torch.int64)
    for layer, states in expose_states(graph).items():
        here = [node for node in found if node.meta["region"] == f"layer.{layer}"]
        for kind, node, state in zip(CACHED, here, states, strict=False):
            given = add_input(graph, cache_input(kind, layer), shape(state), value(state).dtype)
            carry(node, given, new)
            graph.outputs[output_name(kind, layer)] = state
    output = graph.fx_graph.output_node()
    output.args = ((*output.args[0], *graph.outputs.values()),)  # type: ignore[misc]


def _drop_masks(graph: ModelGraph) -> None:
    """Those of a sequence of its own, which count its tokens."""
    for layer in _attending(graph, graph.layers):
        change_attention(layer.attention, mask=None, is_causal=True)
    graph.token_index = None
    graph.clean_up()


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


@dataclass(frozen=True)
class _Inputs:
    """Inputs that are added for a stage.

    Attributes:
        cached: ``[B]``.
        index: ``[B, C]``; None where a slot's number tells which token it holds, or none asks.
        caches: keys and values of each layer that has a cache, ``[B, Hkv, C, D]``.
    """

    cached: fx.Node
    index: fx.Node | None
    caches: dict[int, tuple[fx.Node, ...]]


def _add_inputs(graph: ModelGraph, stage: Sequence[Layer], owners: Sequence[int]) -> _Inputs:
    first = stage[0].index
    batch = shape(stage[0].start)[0]
    cached = add_input(graph, cached_input(first), (batch,), torch.int64)
    index = None
    if first and any(reach.counts_tokens for reach in _reaches(graph, stage)):
        index = add_input(graph, index_cache_input(first), (batch, capacity_size(first)), torch.int64)
    caches = {}
    for layer in (layer for layer in _attending(graph, stage) if owners[layer.index] == layer.index):
        given = attention_arguments(layer.attention)
        pair = []
        for kind, new in zip(CACHED, (given.key, given.value), strict=True):
            batch, heads, _, width = shape(new)
            size = (batch, heads, capacity_size(first), width)
            pair.append(add_input(graph, cache_input(kind, layer.index), size, value(new).dtype))
        caches[layer.index] = tuple(pair)
    return _Inputs(cached, index, caches)


def _reaches(graph: ModelGraph, stage: Sequence[Layer]) -> tuple[Reach, ...]:
    """Each once, in the order of the layers, so that a program is the same in every process."""
    return tuple(dict.fromkeys(graph.reaches[layer.index] for layer in _attending(graph, stage)))


class _Slots:
    """Where the new tokens of a stage go in its caches and what they see there.

    Args:
        edit: where.
        inputs: of the stage.
        tokens: how many tokens each row has had, ``[B]``.
        stream: the new tokens, ``[B, Q, d]``.
        reaches: of the stage's layers.

    Attributes:
        row: ``[B, 1]``.
        slot: ``[B, Q]``.
        masks: for each reach ``[B, 1, Q, C]`` bool.
    """

    def __init__(
        self, edit: Editor, inputs: _Inputs, tokens: fx.Node, stream: fx.Node, reaches: Sequence[Reach]
    ) -> None:
        def count(size: fx.Node) -> fx.Node:
            return edit.call(aten.arange.default, size, device=value(inputs.cached).device)

        def unsqueeze(node: fx.Node, dim: int) -> fx.Node:
            return edit.call(aten.unsqueeze.default, node, dim)

        self.row, new = unsqueeze(count(edit.size(stream, 0)), 1), count(edit.size(stream, 1))
        self.slot = edit.call(aten.add.Tensor, unsqueeze(inputs.cached, 1), new)
        slots = count(edit.size(next(iter(inputs.caches.values()))[0], 2))
        earlier = edit.call(aten.le.Tensor, slots, unsqueeze(unsqueeze(self.slot, 1), 3))  # [B, 1, Q, C]
        keys, queries = unsqueeze(slots, 0), self.slot
        if inputs.index is not None:
            queries = edit.call(aten.add.Tensor, unsqueeze(tokens, 1), new)
            keys = edit.call(aten.index_put_.default, inputs.index, [self.row, self.slot], queries)
        # New tokens are in no group.
        self.masks = {reach: emit_mask(edit, reach, keys, queries, earlier) for reach in reaches}


def _write(
    graph: ModelGraph, layer: Layer, caches: tuple[fx.Node, ...], slots: _Slots
) -> tuple[fx.Node, fx.Node]:
    """Caches with the new keys and values of a layer."""
    given = attention_arguments(layer.attention)
    with edit_after(graph, layer.attention.prev, region=f"layer.{layer.index}") as edit:
        keys, values = (
            edit.call(
                aten.index_put_.default,
                cache,
                [slots.row, None, slots.slot],
                edit.call(aten.transpose.int, new, 1, 2),
            )
            for cache, new in zip(caches, (given.key, given.value), strict=True)
        )
    return keys, values


def _attend(graph: ModelGraph, layer: Layer, held: tuple[fx.Node, fx.Node], slots: _Slots) -> None:
    keys, values = held
    mask = slots.masks[graph.reaches[layer.index]]
    change_attention(layer.attention, key=keys, value=values, mask=mask, is_causal=False)
