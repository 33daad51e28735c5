"""Arguments of a call that a routed model refuses, each looked at by itself."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import Cache, StaticCache

from ..capture.layer_configs import layer_config
from ..config.routing_config import RoutingConfig
from ..errors import InputError
from .cache import CachedRows, RoutedCache
from .prompt_reduction import ReducedFeatures

VISUAL_INPUTS = ("pixel_values", "pixel_values_images", "pixel_values_videos")
"""What processors call pictures and videos; Video-LLaVA's has a name of its own for pictures."""


def check_tensors(given: Mapping[str, Any], device: torch.device) -> None:
    """Inputs have to lie where the model does and to have the kind of dtype that a processor returns."""
    for name, tensor in given.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.device.type != device.type or tensor.device.index not in (device.index, None):
            raise InputError(
                f"{name} is on {tensor.device}, but the model is on {device}; expected the same device. Call "
                f"inputs.to(model.device)."
            )
        # Qwen3-Omni computes its positions in floating point; the decoder looks whether they are whole.
        is_index = tensor.dtype in (torch.int64, torch.int32) or (
            name == "position_ids" and tensor.is_floating_point()
        )
        if name in ("input_ids", "position_ids") and not is_index:
            raise InputError(f"{name} has dtype {tensor.dtype}; expected int64, as a processor returns.")
        if name in (*VISUAL_INPUTS, "inputs_embeds") and not tensor.is_floating_point():
            raise InputError(
                f"{name} has dtype {tensor.dtype}; expected floating point, rescaled and normalised as a processor "
                f"returns it."
            )


def cache_of(given: Mapping[str, Any]) -> tuple[Any, int]:
    """The cache of a call and the tokens that it holds."""
    cache = given.get("past_key_values")
    if cache is not None and (not isinstance(cache, Cache) or isinstance(cache, StaticCache)):
        raise InputError(
            f"past_key_values is a {type(cache).__name__}; expected a RoutedCache, an empty DynamicCache or none: the "
            f"layers of a routed model cache different numbers of tokens."
        )
    return cache, cache.get_seq_length() if cache is not None else 0


def has_features(given: Mapping[str, Any]) -> bool:
    """Whether a call brings pictures or what an encoder made of them."""
    encoded = (given.get("mm_encoder_outputs") or {}).values()
    return any(value is not None for value in (*map(given.get, VISUAL_INPUTS), *encoded))


def refuse_unreduced(given: Mapping[str, Any], config: RoutingConfig) -> None:
    """A reduction has to have happened where pictures were encoded elsewhere."""
    encoded = (given.get("mm_encoder_outputs") or {}).values()
    is_unreduced = any(not isinstance(value, ReducedFeatures) for value in encoded if value is not None)
    if is_unreduced or not has_features(given):
        raise InputError(
            f"Features of pictures came without method {config.method!r} having reduced them; expected pixel_values, "
            f"or what get_image_features of the routed model returns as mm_encoder_outputs."
        )


def refuse_new_images(given: Mapping[str, Any], cache: Any) -> None:
    for name in VISUAL_INPUTS:
        if given.get(name) is not None:
            raise InputError(
                f"{name} was given together with a cache of {cache.get_seq_length()} tokens; expected images only "
                f"in the first call. Leave {name} out if the new tokens have no image of their own; otherwise send "
                f"the whole conversation as one prompt without a cache."
            )


def refuse_visual_end(is_visual: torch.Tensor, lengths: torch.Tensor) -> None:
    rows = is_visual.gather(1, lengths[:, None] - 1).flatten().nonzero().flatten().tolist()
    if rows:
        raise InputError(
            f"The prompt ends with a visual token in rows {rows}; expected text after the images: its last token asks "
            f"for the visual ones. Apply the chat template with add_generation_prompt=True."
        )


def check_visual_mask(mask: Any, embeds: torch.Tensor) -> None:
    if embeds.ndim != 3 or 0 in embeds.shape:
        raise InputError(
            f"inputs_embeds has shape {list(embeds.shape)}; expected [batch, length, width], all above 0."
        )
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.shape != embeds.shape[:2]:
        what = (
            f"has dtype {mask.dtype} and shape {list(mask.shape)}"
            if isinstance(mask, torch.Tensor)
            else f"is a {type(mask).__name__}"
        )
        raise InputError(
            f"visual_mask {what}; expected a bool tensor {list(embeds.shape[:2])}, True for visual tokens."
        )


def check_owner(rows: CachedRows, config: RoutingConfig, owner: str) -> None:
    """A routed cache has to be of the model that routes with `config` and has the identity `owner`."""
    if rows.config != config:
        raise InputError(
            f"past_key_values was made with {rows.config}, but this model routes with {config}. Use the cache with the "
            f"model that made it."
        )
    if rows.owner != owner:
        raise InputError(
            "past_key_values was made by another routed model; expected a cache of this one. Use the cache with the "
            "model that made it."
        )


def cache_sizes(model_config: Any) -> tuple[int, int, int]:
    """Layers of the decoder that have keys and values, heads of those of the first one in its own cache, their width.

    Latent keys and values (MLA, arXiv 2405.04434, section 2.1) are cached as one head, before they are expanded.
    """
    text = model_config.get_text_config(decoder=True)
    layers = text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", None) or 0)
    if (latent := latent_width(model_config)) is not None:
        return layers, 1, latent
    first = layer_config(text, 0)
    heads = getattr(first, "num_key_value_heads", None) or first.num_attention_heads
    width = getattr(first, "head_dim", None) or first.hidden_size // first.num_attention_heads
    return layers, heads, width


def latent_width(model_config: Any) -> int | None:
    """Width of the one vector of a token that its keys and values are computed of; None if each has its own."""
    width: int | None = getattr(model_config.get_text_config(decoder=True), "kv_lora_rank", None)
    return width


def check_plain_cache(cache: Any, model_config: Any, batch: int) -> None:
    """A cache that nothing was routed into has to fit the decoder at least."""
    count, heads, width = cache_sizes(model_config)
    # Layers that know earlier tokens by a state have no keys at all.
    layers = [layer for layer in getattr(cache, "layers", []) if getattr(layer, "keys", 0) is not None]
    expected = count, batch, heads, width
    first = next((layer.keys.shape for layer in layers if hasattr(layer, "keys")), (0, 0, 0, 0))
    found = len(layers), first[0], first[1], first[3]
    if found != expected:
        raise InputError(
            f"past_key_values holds {found[0]} layers of {found[1]} rows with {found[2]} heads of size {found[3]}; "
            f"expected {expected[0]} layers of {batch} rows with {heads} heads of size {width}. It was made by another "
            f"model."
        )


def read_mask(mask: Any, input_ids: torch.Tensor) -> torch.Tensor:
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


def read_new_mask(mask: Any, cache: RoutedCache, new: int) -> torch.Tensor | None:
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


def _refuse_other_values(mask: torch.Tensor) -> None:
    if not ((mask == 0) | (mask == 1)).all():
        raise InputError(
            "attention_mask holds values other than 0 and 1; expected the mask that a processor returns."
        )


def refuse_gradients(given: Mapping[str, Any]) -> None:
    """Raise InputError if a loss is asked for that gradients could be expected of."""
    names = [name for name in ("labels", "shift_labels") if given.get(name) is not None]
    if names and torch.is_grad_enabled():
        raise InputError(
            f"{names[0]} was given with gradients enabled, but a routed model is for inference: a loss carries no "
            f"gradients through the decoder. Call it under torch.no_grad() for the loss, and train the model that was "
            f"compiled."
        )
