"""Read and check the inputs of a call before anything runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache

from ..capture import tokens_per_image
from ..config import RoutingConfig
from ..errors import InputError
from ..limits import Limits
from ..plan import RowPlan, plan_rows
from .cache import RoutedCache
from .images import split_images
from .reduction import Reduction, plan_entry
from .routing import Routing
from .rows import Places

_VISUAL_INPUTS = ("pixel_values", "pixel_values_videos")
_GRIDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids")


@dataclass
class Prompt:
    """A batch of prompts with visual tokens, on its way through the model.

    Attributes:
        plan: how many tokens of each row run where.
        places: where the tokens lie in the columns of the batch; None if no row is padded, or not known before the
            pictures are encoded.
        reduction: how pictures enter the decoder; None if with all tokens.
        routing: set by the decoder.
        commit: set by the decoder; puts keys and values into the cache when the whole call has succeeded.
    """

    plan: RowPlan
    places: Places | None
    reduction: Reduction | None = None
    routing: Routing | None = None
    commit: Callable[[], None] | None = None

    @property
    def is_done(self) -> bool:
        """Whether the routed program ran."""
        return self.routing is not None


@dataclass
class Continuation:
    """New tokens on a routed cache.

    Attributes:
        cache: what the rows hold so far.
        is_token: which of the new columns hold a token, ``[B, Q]`` bool; None if all do.
        commit: as in `Prompt`.
    """

    cache: RoutedCache
    is_token: torch.Tensor | None
    commit: Callable[[], None] | None = None

    @property
    def is_done(self) -> bool:
        """Whether the routed program ran."""
        return self.commit is not None


@dataclass(frozen=True)
class PromptReader:
    """Tells what a call of the model is.

    Attributes:
        model_config: config of the vision-language model.
        routing_config: what is routed.
        visual_ids: ids of the placeholders of visual features.
        owner: identity of the model.
        routes_text: whether prompts without visual tokens are routed too; otherwise they are left to the model.
        limits: of a call; None for any size.
        has_streams: whether hidden states can be returned.
    """

    model_config: Any
    routing_config: RoutingConfig
    visual_ids: tuple[int, ...]
    owner: str
    routes_text: bool = False
    limits: Limits | None = None
    has_streams: bool = False

    def read(self, given: Mapping[str, Any], device: torch.device) -> Prompt | Continuation | None:
        """A prompt to route, tokens on a routed cache, or (None) neither.

        Args:
            given: arguments of the call by name.
            device: where the model is.

        Raises:
            InputError: the call asks for something that routing can't give, or would give wrongly.
        """
        refused = ["output_attentions"] if self.has_streams else ["output_attentions", "output_hidden_states"]
        for flag in refused:
            if given.get(flag):
                raise InputError(
                    f"{flag}=True is not available on a routed model. Use the model that was compiled."
                )
        _check_tensors(given, device)
        cache, held = _cache_of(given)
        tokens = given["input_ids"] if given.get("input_ids") is not None else given.get("inputs_embeds")
        if isinstance(cache, RoutedCache) and tokens is not None:
            cache.check_room(held + tokens.shape[1])
        if self.limits is not None and tokens is not None:
            self.limits.check(tokens.shape[0], held + tokens.shape[1])
        return self._continue(given, cache, tokens) if held else self._start(given)

    def check_generate(self, given: Mapping[str, Any], device: torch.device) -> None:
        """Refuse what `read` would refuse after `generate` has encoded the images."""
        cache, held = _cache_of(given)
        if held:
            _refuse_new_images(given, cache)
        else:
            self.read(given, device)

    def _continue(
        self, given: Mapping[str, Any], cache: Any, tokens: torch.Tensor | None
    ) -> Continuation | None:
        """A call on a cache that holds tokens already."""
        _refuse_new_images(given, cache)
        if tokens is None or tokens.shape[1] == 0:
            raise InputError("No new tokens were given on a cache; expected input_ids with one or more.")
        # A single token was generated; looking at it would make the device wait at every step.
        is_turn = given.get("input_ids") is not None and tokens.shape[1] > 1
        if is_turn and self._is_visual(tokens).any():
            raise InputError(
                "input_ids holds image tokens together with a cache; expected images only in the first call. Send the "
                "whole conversation as one prompt without a cache."
            )
        rows = getattr(cache, "rows", None)
        if rows is None and self.routes_text:
            raise InputError(
                "past_key_values was made by another model; expected a RoutedCache of this one, or an empty cache."
            )
        if rows is None:
            _check_plain_cache(cache, self.model_config, tokens.shape[0])
            return None
        if rows.config != self.routing_config:
            raise InputError(
                f"past_key_values was made with {rows.config}, but this model routes with {self.routing_config}. Use "
                f"the cache with the model that made it."
            )
        if rows.owner != self.owner:
            raise InputError(
                "past_key_values was made by another routed model; expected a cache of this one. Use the cache with "
                "the model that made it."
            )
        held = len(rows.next_position)
        if tokens.shape[0] != held:
            raise InputError(
                f"The call has {tokens.shape[0]} rows, but the cache holds {held}; expected as many. Use "
                f"cache.batch_select_indices or batch_repeat_interleave to change its rows."
            )
        return Continuation(cache, _new_tokens(given.get("attention_mask"), cache, tokens.shape[1]))

    def _start(self, given: Mapping[str, Any]) -> Prompt | None:
        """A call that starts a sequence."""
        input_ids = given.get("input_ids")
        has_features = any(given.get(name) is not None for name in _VISUAL_INPUTS)
        if self.routing_config.entry_ratio < 1 and given.get("pixel_values_videos") is not None:
            raise InputError(
                f"pixel_values_videos were given, but method {self.routing_config.method!r} reduces images; expected "
                f"images only. Use a method without a reduction for videos, such as 'pdrop'."
            )
        if input_ids is None:
            came = "came as inputs_embeds" if given.get("inputs_embeds") is not None else "is missing"
            raise InputError(
                f"The prompt {came}; expected input_ids, in which the visual tokens can be found."
            )
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            raise InputError(
                f"input_ids has shape {list(input_ids.shape)}; expected [batch, length], both above 0."
            )
        is_token = _read_mask(given.get("attention_mask"), input_ids)
        # One copy to the host: all shapes follow from what is read here.
        ids = input_ids.cpu().masked_fill(~is_token, -1)
        is_visual = self._is_visual(ids)
        if not is_visual.any():
            if has_features:
                raise InputError(
                    "pixel_values were given but input_ids holds no image token; expected one for each feature. Use "
                    "the model's processor and put its image placeholder into the prompt."
                )
            if not self.routes_text:
                return None
        elif not has_features and given.get("mm_encoder_outputs") is None:
            raise InputError(
                f"input_ids holds {is_visual.sum(dim=1).tolist()} image tokens in its rows but no pixel_values were "
                f"given. Pass what the processor returned."
            )
        places = None
        if not is_token.all():
            places = Places.of(is_token)
            is_visual, ids = places.to_front(is_visual), places.to_front(ids)
        lengths = is_token.sum(dim=1)
        _refuse_visual_end(is_visual, lengths)
        images = split_images(ids, is_visual, tokens_per_image(self.model_config, given))
        if self.limits is not None:
            self.limits.check_images(images)
        device = input_ids.device
        if self.routing_config.entry_ratio < 1:
            left, counts, entering = plan_entry(self.routing_config, is_visual, lengths.tolist(), images)
            plan = plan_rows(self.routing_config, left.to(device), counts, entering)
            columns = _visual_columns(self._is_visual(input_ids.cpu()) & is_token)
            return Prompt(plan, None, Reduction(is_token.to(device), columns.to(device), left.shape[1]))
        plan = plan_rows(self.routing_config, is_visual.to(device), lengths.tolist(), images)
        return Prompt(plan, places.to(device) if places else None)

    def _is_visual(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.isin(ids, torch.tensor(self.visual_ids, device=ids.device))


def without_grids(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call on a cache, less what tells the positions of pictures that are cached already."""
    return {name: value for name, value in given.items() if name not in _GRIDS}


def _visual_columns(is_visual: torch.Tensor) -> torch.Tensor:
    """Columns of the visual tokens of each row, ``[B, N]``; S where a row has no more."""
    columns = torch.arange(is_visual.shape[1]).expand(is_visual.shape)
    widest = int(is_visual.sum(dim=1).max())
    return columns.masked_fill(~is_visual, is_visual.shape[1]).sort(dim=1).values[:, :widest].contiguous()


def _cache_of(given: Mapping[str, Any]) -> tuple[Any, int]:
    """The cache of a call and the tokens that it holds."""
    cache = given.get("past_key_values")
    if cache is not None and not isinstance(cache, Cache):
        raise InputError(
            f"past_key_values is a {type(cache).__name__}; expected a RoutedCache, an empty DynamicCache or none."
        )
    return cache, cache.get_seq_length() if cache is not None else 0


def _refuse_new_images(given: Mapping[str, Any], cache: Any) -> None:
    for name in _VISUAL_INPUTS:
        if given.get(name) is not None:
            raise InputError(
                f"{name} was given together with a cache of {cache.get_seq_length()} tokens; expected images only "
                f"in the first call. Leave {name} out if the new tokens have no image of their own; otherwise send "
                f"the whole conversation as one prompt without a cache."
            )


def _check_tensors(given: Mapping[str, Any], device: torch.device) -> None:
    """Inputs have to lie where the model does and to have the kind of dtype that a processor returns."""
    for name, tensor in given.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.device.type != device.type or tensor.device.index not in (device.index, None):
            raise InputError(
                f"{name} is on {tensor.device}, but the model is on {device}; expected the same device. Call "
                f"inputs.to(model.device)."
            )
        if name in ("input_ids", "position_ids") and tensor.dtype not in (torch.int64, torch.int32):
            raise InputError(f"{name} has dtype {tensor.dtype}; expected int64, as a processor returns.")
        if name in (*_VISUAL_INPUTS, "inputs_embeds") and not tensor.is_floating_point():
            raise InputError(
                f"{name} has dtype {tensor.dtype}; expected floating point, rescaled and normalised as a processor "
                f"returns it."
            )


def _check_plain_cache(cache: Any, model_config: Any, batch: int) -> None:
    """A cache that nothing was routed into has to fit the decoder at least."""
    text = model_config.get_text_config(decoder=True)
    layers = [layer for layer in getattr(cache, "layers", []) if getattr(layer, "keys", None) is not None]
    heads = getattr(text, "num_key_value_heads", text.num_attention_heads)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    expected = text.num_hidden_layers, batch, heads, width
    first = layers[0].keys.shape if layers else (0, 0, 0, 0)
    found = len(layers), first[0], first[1], first[3]
    if found != expected:
        raise InputError(
            f"past_key_values holds {found[0]} layers of {found[1]} rows with {found[2]} heads of size {found[3]}; "
            f"expected {expected[0]} layers of {batch} rows with {heads} heads of size {width}. It was made by another "
            f"model."
        )


def _read_mask(mask: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Which columns hold a token, ``[B, S]`` bool on the host."""
    if mask is None:
        return torch.ones(input_ids.shape, dtype=torch.bool)
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        raise InputError(
            "attention_mask is no [batch, length] tensor; expected the mask that a processor returns."
        )
    if mask.shape != input_ids.shape:
        raise InputError(
            f"attention_mask has shape {list(mask.shape)}, but input_ids {list(input_ids.shape)}; expected one entry "
            f"for each token."
        )
    mask = mask.cpu()
    _refuse_other_values(mask)
    is_token: torch.Tensor = mask != 0
    empty = (~is_token).all(dim=1).nonzero().flatten().tolist()
    if empty:
        raise InputError(
            f"attention_mask marks rows {empty} as padding throughout; expected at least one token in each row. Leave "
            f"empty rows out of the batch."
        )
    return is_token


def _refuse_other_values(mask: torch.Tensor) -> None:
    if not ((mask == 0) | (mask == 1)).all():
        raise InputError(
            "attention_mask holds values other than 0 and 1; expected the mask that a processor returns."
        )


def _new_tokens(mask: Any, cache: RoutedCache, new: int) -> torch.Tensor | None:
    """Which of the `new` columns hold a token, from a mask over all columns."""
    if mask is None:
        return None
    rows = cache.rows
    assert rows is not None
    wanted = (len(rows.next_position), rows.columns + new)
    if not isinstance(mask, torch.Tensor) or tuple(mask.shape) != wanted:
        shape = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise InputError(
            f"attention_mask has shape {shape}; expected {list(wanted)}: the mask of the prompt, followed by that of "
            f"all tokens since."
        )
    # Reading it on the device would make every generated token wait; for a turn of a conversation it is cheap.
    if new > 1 or mask.device.type == "cpu":
        _refuse_other_values(mask)
        seen, held = (mask[:, :-new] != 0).sum(dim=1), rows.tokens[0] + rows.gone
        differ = (seen != held).nonzero().flatten().tolist()
        if differ:
            raise InputError(
                f"attention_mask marks {seen[differ].tolist()} earlier tokens in rows {differ}, but the cache holds "
                f"{held[differ].tolist()}; expected the masks of the earlier calls, followed by the new one."
            )
    is_token: torch.Tensor = mask[:, -new:] != 0
    return is_token


def _refuse_visual_end(is_visual: torch.Tensor, lengths: torch.Tensor) -> None:
    rows = is_visual.gather(1, lengths[:, None] - 1).flatten().nonzero().flatten().tolist()
    if rows:
        raise InputError(
            f"The prompt ends with a visual token in rows {rows}; expected text after the images: its last token asks "
            f"for the visual ones. Apply the chat template with add_generation_prompt=True."
        )
