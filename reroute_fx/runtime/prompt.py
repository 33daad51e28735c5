"""Read and check the inputs of a call before anything runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..config import RoutingConfig
from ..errors import InputError

_VISUAL_INPUTS = ("pixel_values", "pixel_values_videos")
_REFUSED_FLAGS = ("output_attentions", "output_hidden_states")


@dataclass(frozen=True)
class Routing:
    """What was selected for the rows of a prompt.

    Attributes:
        config: the configuration that selected.
        selected: for each decision layer the kept tokens, ``[B, k]`` int64, ascending. They count in the row's
            visual tokens, for `physical_delete` in those that were left.
        scores: for each decision layer the scores of the tokens in its pool, ``[B, pool]`` float32.
        kv_lengths: rows in the key-value cache of each layer after the prompt.
    """

    config: RoutingConfig
    selected: dict[int, torch.Tensor]
    scores: dict[int, torch.Tensor]
    kv_lengths: list[int]


@dataclass
class Prompt:
    """A prompt with visual tokens, on its way through the model.

    Attributes:
        visual_index: ascending positions of the visual tokens, ``[B, N]`` int64.
        routing: set by the decoder.
    """

    visual_index: torch.Tensor
    routing: Routing | None = field(default=None)


class DecodeStep:
    """One new token on a routed cache."""


def read_call(
    given: Mapping[str, Any], config: RoutingConfig, visual_ids: tuple[int, ...]
) -> Prompt | DecodeStep | None:
    """What a call of the model is: a prompt to route, a step on a routed cache, or (None) neither.

    Raises:
        InputError: the call asks for something that routing can't give, or would give wrongly.
    """
    for flag in _REFUSED_FLAGS:
        if given.get(flag):
            raise InputError(
                f"{flag}=True is not available on a routed model. Use the model that was compiled."
            )
    cache = given.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        return _continue(given, cache, config)
    return _start(given, visual_ids)


def _continue(given: Mapping[str, Any], cache: Any, config: RoutingConfig) -> DecodeStep | None:
    """A call on a cache that holds tokens already."""
    for name in _VISUAL_INPUTS:
        if given.get(name) is not None:
            raise InputError(
                f"{name} was given together with a cache of {cache.get_seq_length()} tokens; expected images only "
                f"in the first call. Send the whole conversation as one prompt without a cache."
            )
    made_by = getattr(cache, "routing_config", None)
    if made_by is None:
        return None
    if made_by != config:
        raise InputError(
            f"past_key_values was made with {made_by}, but this model routes with {config}. Use the cache with "
            f"the model that made it."
        )
    tokens = given["input_ids"] if given.get("input_ids") is not None else given.get("inputs_embeds")
    if tokens is None or tokens.shape[1] != 1:
        raise InputError(
            f"{'no' if tokens is None else tokens.shape[1]} new tokens on a routed cache; expected one. Chunked "
            f"prefill, assisted generation and further turns on the same cache are not supported: send the whole "
            f"conversation as one prompt."
        )
    _refuse_padding(given.get("attention_mask"))
    return DecodeStep()


def _start(given: Mapping[str, Any], visual_ids: tuple[int, ...]) -> Prompt | None:
    """A call that starts a sequence."""
    input_ids = given.get("input_ids")
    has_features = any(given.get(name) is not None for name in _VISUAL_INPUTS)
    if input_ids is None:
        raise InputError(
            "The prompt came as inputs_embeds; expected input_ids, in which the visual tokens can be found."
        )
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise InputError(
            f"input_ids has shape {list(input_ids.shape)}; expected [batch, length], both above 0."
        )
    is_visual = torch.isin(input_ids, torch.tensor(visual_ids, device=input_ids.device))
    counts = is_visual.sum(dim=1).tolist()
    if any(counts) and not has_features and given.get("mm_encoder_outputs") is None:
        raise InputError(
            f"input_ids holds {max(counts)} image tokens but no pixel_values were given. Pass what the "
            f"processor returned."
        )
    if not any(counts):
        if has_features:
            raise InputError(
                "pixel_values were given but input_ids holds no image token; expected one for each feature. Use "
                "the model's processor and put its image placeholder into the prompt."
            )
        return None
    if len(set(counts)) > 1:
        raise InputError(
            f"The rows of the batch hold {counts} visual tokens; expected the same number in each. Run rows with "
            f"different images one by one."
        )
    _refuse_padding(given.get("attention_mask"))
    _refuse_visual_end(is_visual)
    return Prompt(_positions(is_visual, counts[0]))


def _positions(is_visual: torch.Tensor, count: int) -> torch.Tensor:
    length = is_visual.shape[1]
    position = torch.arange(length, device=is_visual.device).expand_as(is_visual)
    return position.masked_fill(~is_visual, length).sort(dim=1).values[:, :count].contiguous()


def _refuse_padding(attention_mask: Any) -> None:
    if attention_mask is None:
        return
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        raise InputError(
            "attention_mask is no [batch, length] tensor; expected the mask that a processor returns."
        )
    padded = (attention_mask == 0).any(dim=1).nonzero().flatten().tolist()
    if padded:
        raise InputError(
            f"attention_mask marks padding in rows {padded}; expected rows of equal length without padding. Run rows "
            f"of different lengths one by one."
        )


def _refuse_visual_end(is_visual: torch.Tensor) -> None:
    rows = is_visual[:, -1].nonzero().flatten().tolist()
    if rows:
        raise InputError(
            f"The prompt ends with a visual token in rows {rows}; expected text after the images: its last token asks "
            f"for the visual ones. Apply the chat template with add_generation_prompt=True."
        )
