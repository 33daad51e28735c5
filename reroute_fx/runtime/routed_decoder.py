"""The text decoder of a routed model."""

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from transformers import DynamicCache
from transformers.modeling_outputs import MoeModelOutputWithPast

from ..capture.layer_features import LayerFeatures
from ..capture.token_inputs import TokenInput
from ..config.routing_config import RoutingConfig
from ..errors import InputError, UnsupportedModelError
from ..passes import Reach
from ..passes.tensor_names import (
    GROUPS,
    INPUTS_EMBEDS,
    LENGTHS,
    NEW_TOKENS,
    POSITION_IDS,
    VISUAL_INDEX,
    output_name,
    positions_input,
    read_output_name,
)
from ..selection.row_plan import RowPlan
from ..selection.selection_result import Routing
from .buckets import cut_outputs, pad_inputs
from .cache import CachedRows, RoutedCache
from .masks import is_left_to_the_decoder, read_masks
from .prompt import Prompt, TokensOnCache
from .rows import Places

UNROUTED_CALL = object()
"""A call without visual tokens, which is left to the model."""

current_call: ContextVar[Any] = ContextVar("current_call", default=None)
"""What the model that contains the decoder is doing: a `Prompt`, a `TokensOnCache` or `UNROUTED_CALL`."""


_HARMLESS = {
    "cache_position",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "logits_to_keep",
    "labels",
    "shift_labels",
    "num_items_in_batch",
}
"""Arguments of a decoder that change nothing about what the routed program computes."""
_KNOWN = _HARMLESS | {
    "attention_mask",
    "input_ids",
    "inputs_embeds",
    "position_ids",
    "past_key_values",
    "use_cache",
}


@dataclass
class DecoderOutput(MoeModelOutputWithPast):
    """With all that models read of what their decoders return; what the programs lack is None, and refused if asked."""

    shared_kv_states: Any = None


class RoutedDecoder(torch.nn.Module):
    """Mixin for a Hugging Face text decoder: prompts with visual tokens and what follows run routed programs.

    Attributes:
        prefill: program for prompts.
        continuation: program for tokens on a cache.
        routing_config: what they route.
        position_rank: 2 for positions ``[B, S]``, 3 for ``[3, B, S]``.
        layer_features: visual features that are added inside the decoder; None if there are none.
        token_inputs: what the programs take for each token besides.
        kinds: what the tokens of the layers with each name of a mask see.
        stateful: layers that know earlier tokens by a state, not by attention.
        lets_all_see_all: whether the decoder's tokens see later ones where it gets no mask.
        owner: identity of the model, kept with the caches that it makes.
        uses_buckets: whether prompts run in rounded sizes, for CUDA graphs.
        with_streams: makes the program of that name that returns the stream before each layer as well; None if there
            is none.
    """

    prefill: Callable[..., Any]
    continuation: Callable[..., Any]
    routing_config: RoutingConfig
    position_rank: int
    layer_features: LayerFeatures | None
    token_inputs: tuple[TokenInput, ...] = ()
    kinds: Mapping[str, Sequence[Reach]] = MappingProxyType({})
    stateful: tuple[int, ...] = ()
    lets_all_see_all: bool = False
    owner: str
    uses_buckets: bool
    with_streams: Callable[[str], Callable[..., Any]] | None = None
    config: Any

    def routed_forward(self, unrouted: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = current_call.get()
        if call is None:
            raise InputError(
                f"A part of the routed model was called by itself and reached its decoder ({type(self).__name__}); "
                f"expected a call of the routed model, which knows the visual tokens of the prompt. Call that, or the "
                f"part of the model that was compiled."
            )
        if call is UNROUTED_CALL:
            return unrouted(*args, **kwargs)
        if kwargs.get("output_attentions", getattr(self.config, "output_attentions", False)):
            raise InputError(
                "output_attentions is True, in the call or in the config of the decoder; expected False: the programs "
                "keep no attention maps. Use the model that was compiled."
            )
        added = self._take_addends(kwargs) | self._take_token_inputs(kwargs)
        _refuse_what_the_programs_lack(**kwargs)
        mask = kwargs.get("attention_mask")
        groups = read_masks(mask, call, kwargs["inputs_embeds"].shape[1], self.kinds)
        if isinstance(call, Prompt):
            self._refuse_no_mask(mask)
            return self._start(call, {**added, **self._groups(groups, kwargs["inputs_embeds"])}, **kwargs)
        return self._continue(call, added, **kwargs)

    def _take_addends(self, given: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The addends of a call in the columns of the batch, instead of what `given` loses."""
        features = self.layer_features
        if "addends" in given:
            dense: dict[str, torch.Tensor] = given.pop("addends")
            return dense
        if features is None:
            return {}
        addends = features.addends(given, given["inputs_embeds"])
        for name in (features.mask, features.features):
            given.pop(name, None)
        return addends

    def _take_token_inputs(self, given: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Those of a call in the columns of the batch, instead of what `given` loses."""
        embeds = given["inputs_embeds"]
        taken = {each.name: each.take(given, embeds) for each in self.token_inputs}
        for name in taken:
            given.pop(name, None)
        return taken

    def _groups(self, found: torch.Tensor | None, embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        """The input of that name, in the columns of the batch, if the program takes it."""
        if not any(reach.groups for reaches in self.kinds.values() for reach in reaches):
            return {}
        none = torch.zeros(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
        return {GROUPS: none if found is None else none + found}

    def _refuse_no_mask(self, mask: Any) -> None:
        if self.lets_all_see_all and is_left_to_the_decoder(mask):
            raise InputError(
                f"The model gives its decoder no mask of which tokens of the prompt see later ones, so that all would "
                f"({type(self).__name__}); expected one. Pass token_type_ids as the processor returns them."
            )

    def _start(
        self,
        prompt: Prompt,
        added: Mapping[str, torch.Tensor],
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        **given: Any,
    ) -> DecoderOutput:
        wanted = self._wanted_states(given)
        cache = self._cache(past_key_values, use_cache)
        if cache is None and attention_mask is None:
            _refuse_packed_rows(position_ids, self.position_rank)
        places, entered, cells = prompt.places, None, {}
        if prompt.reduction is not None:
            rows = prompt.reduction.enter(inputs_embeds)
            places, embeds, entered = rows.places, rows.embeds, rows.entered
            cells = prompt.reduction.cells_of(entered, prompt.plan.inputs[VISUAL_INDEX].shape[1])
            positions = prompt.reduction.positions(position_ids, places)
            if self.position_rank == 3:
                positions = positions[-3:] if positions.ndim == 3 else positions.expand(3, *positions.shape)
                positions = positions.contiguous()
        else:
            positions = self._positions(position_ids, inputs_embeds, places)
            embeds = places.to_front(inputs_embeds) if places else inputs_embeds
        if places:
            added = {name: places.to_front(columns) for name, columns in added.items()}
        program = self._program("prefill", wanted)
        others = {**prompt.plan.inputs, **cells, **added}
        hidden, values = self._prefill(embeds, positions, others, prompt.plan, program)
        layers = range(self.config.num_hidden_layers)
        prompt.routing = Routing(
            self.routing_config,
            prompt.plan,
            len(layers),
            all_scores={i: values[output_name("scores", i)] for i in self.routing_config.decision_layers},
            all_kept={i: values[output_name("kept", i)] for i in self.routing_config.decision_layers},
            all_entered=entered,
        )
        if cache is not None:
            held = self._cached_rows(prompt, positions, inputs_embeds.shape[1], entered)
            keys = [values.get(output_name("key", i)) for i in layers]
            states = [values.get(output_name("value", i)) for i in layers]
            indices = {i: index for i in layers if (index := values.get(output_name("index", i))) is not None}
            prompt.commit = lambda: cache.fill(held, keys, states, indices, self.stateful)
        return _output(hidden, cache, places, values, wanted)

    def _wanted_states(self, given: Mapping[str, Any]) -> tuple[int, ...]:
        """Which hidden states a call asks for: that before each layer, and the last one."""
        count = self.config.num_hidden_layers + 1
        asked = given.get("output_hidden_states", getattr(self.config, "output_hidden_states", False))
        if asked is None or isinstance(asked, bool):
            return tuple(range(count)) if asked else ()
        chosen = [asked] if isinstance(asked, int) else asked
        return tuple(sorted({i % count for i in chosen if -count <= i < count}))

    def _program(self, name: str, wanted_states: tuple[int, ...]) -> Callable[..., Any]:
        if not wanted_states:
            program: Callable[..., Any] = getattr(self, name)
            return program
        if self.with_streams is None:
            raise InputError(
                "output_hidden_states is set, in the call or in the config of the decoder; expected False: an artifact "
                "has no programs that return them. Use the routed model that was exported."
            )
        return self.with_streams(name)

    def _prefill(
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        others: Mapping[str, torch.Tensor],
        plan: RowPlan,
        program: Callable[..., Any],
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Hidden states ``[B, S, d]`` and what `route` exposes, in the sizes of the prompt.

        `others` are the inputs of the plan, those of rules, and what is added inside the decoder.
        """
        inputs = {INPUTS_EMBEDS: embeds.contiguous(), POSITION_IDS: positions, **others}
        if self.uses_buckets:
            inputs = pad_inputs(inputs, [each.name for each in self.token_inputs])
        result = program(**inputs)
        hidden, values = result["output"].last_hidden_state, result["routing"]
        if self.uses_buckets:
            hidden = hidden[:, : embeds.shape[1]]
            values = cut_outputs(values, plan, embeds.shape[1], self.stateful)
        return hidden, values

    def _cache(self, given: Any, use_cache: bool | None) -> RoutedCache | None:
        if given is None:
            wanted = self.config.use_cache if use_cache is None else use_cache
            return RoutedCache() if wanted else None
        if not isinstance(given, DynamicCache) or given.offloading:
            kind = (
                "an offloading DynamicCache"
                if isinstance(given, DynamicCache)
                else f"a {type(given).__name__}"
            )
            raise InputError(
                f"past_key_values is {kind}; expected a RoutedCache, an empty DynamicCache or none: the layers of a "
                f"routed model cache different numbers of tokens. Leave cache_implementation unset."
            )
        return RoutedCache.adopt(given)

    def _positions(
        self, given: torch.Tensor | None, embeds: torch.Tensor, places: Places | None
    ) -> torch.Tensor:
        """Rotary positions of a prompt, tokens first, ``[B, S]`` or ``[3, B, S]``."""
        batch, length = embeds.shape[:2]
        if given is None:
            given = torch.arange(length, device=embeds.device).expand(batch, length)
            places = None
        elif given.is_floating_point():
            given = _whole(given)
        if self.position_rank == 3:
            # Hugging Face may put the text positions in front of the three visual ones.
            given = given[-3:] if given.ndim == 3 else given.expand(3, batch, length)
        else:
            given = given.expand(batch, length)
        if places:
            return places.to_front(given, given.ndim - 1)
        # A copy: a program that was compiled for a tensor of its own is compiled again for a view.
        return given.clone(memory_format=torch.contiguous_format)

    def _cached_rows(
        self, prompt: Prompt, positions: torch.Tensor, columns: int, entered: torch.Tensor | None
    ) -> CachedRows:
        """What the cache holds after a prompt of so many columns."""
        plan, device = prompt.plan, positions.device
        lengths = plan.inputs[LENGTHS]
        is_padding = torch.arange(positions.shape[-1], device=device) >= lengths[:, None]
        highest = positions.masked_fill(is_padding, -1).amax(dim=-1)
        gone = torch.zeros_like(lengths)
        if entered is not None and prompt.reduction is not None:
            gone = (prompt.reduction.visual_columns < columns).sum(dim=1) - entered.sum(dim=1)
        return CachedRows(
            self.routing_config,
            self.owner,
            columns,
            filled={0: positions.shape[-1]}
            | {start: max(rows) for start, rows in plan.stage_lengths.items()},
            tokens=plan.stage_tokens,
            next_position=(highest.amax(dim=0) if positions.ndim == 3 else highest) + 1,
            gone=gone,
        )

    def _continue(
        self,
        call: TokensOnCache,
        added: Mapping[str, torch.Tensor],
        inputs_embeds: torch.Tensor,
        **given: Any,
    ) -> DecoderOutput:
        cache, rows = call.cache, call.cache.rows
        assert rows is not None
        batch, new = inputs_embeds.shape[:2]
        places = Places.of(call.is_token) if call.is_token is not None and new > 1 else None
        embeds = places.to_front(inputs_embeds) if places else inputs_embeds
        if places:
            added = {name: places.to_front(columns) for name, columns in added.items()}
        # What the model computes from its masks counts padding or belongs to its last prompt.
        positions = rows.next_position[:, None] + torch.arange(new, device=embeds.device)
        if self.position_rank == 3:
            positions = positions.expand(3, batch, new)
        wanted = self._wanted_states(given)
        program = self._program("continuation", wanted)
        cache.reserve(new)
        tokens = (
            torch.full_like(rows.next_position, new) if call.is_token is None else call.is_token.sum(dim=1)
        )
        result = program(
            inputs_embeds=embeds.contiguous(),
            position_ids=positions.contiguous(),
            **added,
            **self._stage_positions(rows, new),
            **cache.inputs(),
            **({NEW_TOKENS: tokens} if self.stateful else {}),
        )
        states = result.get("routing", {})
        call.commit = lambda: cache.advance(new, tokens, states)
        return _output(result["output"].last_hidden_state, cache, places, result.get("routing", {}), wanted)

    def _stage_positions(self, rows: CachedRows, new: int) -> dict[str, torch.Tensor]:
        """Inputs that `NumberStages` adds: the next tokens of a stage come right behind its own."""
        if self.routing_config.positions == "original":
            return {}
        later = self.routing_config.decision_layers
        ahead = torch.arange(new, device=rows.next_position.device)
        return {positions_input(start): rows.tokens[start][:, None] + ahead for start in later}


def _output(
    hidden: torch.Tensor,
    cache: RoutedCache | None,
    places: Places | None,
    values: Mapping[str, torch.Tensor],
    wanted_states: tuple[int, ...],
) -> DecoderOutput:
    """What the decoder returns, in the columns of the batch.

    Args:
        hidden: behind the final norm, ``[B, S, d]``.
        cache: to be returned.
        places: of the rows in the columns.
        values: with the stream before each layer, ``[B, S, d]``, if hidden states are wanted.
        wanted_states: numbers of the hidden states to return; the last one is `hidden`.
    """

    def to_columns(rows: torch.Tensor) -> torch.Tensor:
        return places.to_columns(rows) if places else rows

    hidden, states = to_columns(hidden), None
    if wanted_states:
        count = sum(read_output_name(name)[0] == "stream" for name in values)
        streams = [
            to_columns(values[output_name("stream", i)]) if i in wanted_states else None for i in range(count)
        ]
        states = (*streams, hidden)
    return DecoderOutput(
        last_hidden_state=hidden,
        past_key_values=cache,
        hidden_states=states,  # type: ignore[arg-type]
    )


def _whole(positions: torch.Tensor) -> torch.Tensor:
    """Positions that a model computed in floating point, as int64."""
    if not torch.equal(positions, positions.round()):
        raise InputError(
            "The model gives its decoder fractional position_ids; expected whole ones, which the programs take. Videos "
            "whose frames lie a fraction of a position apart can't be routed."
        )
    return positions.long()


def _refuse_packed_rows(positions: torch.Tensor | None, position_rank: int) -> None:
    """Without a mask and a cache transformers takes positions that restart for several sequences in one row.

    Those of text alone say so: ``[B, S]``, or with multimodal positions the first of ``[4, B, S]``.
    """
    if positions is None or positions.ndim != position_rank or (position_rank == 3 and len(positions) != 4):
        return
    text = positions[0] if position_rank == 3 else positions
    rows = (text.diff(dim=-1) != 1).any(dim=-1).nonzero().flatten().tolist()
    if rows:
        raise InputError(
            f"position_ids restart or jump in rows {rows} and there is no attention_mask: several sequences packed "
            f"into a row; expected one in each. Give every sequence a row of its own, padded with an attention_mask."
        )


def _refuse_what_the_programs_lack(**given: Any) -> None:
    """The programs take embeddings and positions, nothing else."""
    # A flag that is off, or a weight of zero, asks for nothing.
    asked = {
        name: value
        for name, value in given.items()
        if name not in _KNOWN and (isinstance(value, torch.Tensor) or value not in (None, False, 0))
    }
    flags = [name for name, value in asked.items() if value is True]
    if flags:
        raise InputError(
            f"{flags[0]} is True, in the call or in the model's config; expected False: the routed programs don't "
            f"return it. Leave it out, and set {flags[0]} to False in the config and its text_config."
        )
    if asked:
        raise UnsupportedModelError(
            f"The model gives its decoder {list(asked)}; expected embeddings, positions and features "
            f"for its layers only. Models that tell it more of their pictures can't be routed."
        )
