"""Which token ids of a prompt stand for image or video features, and how many of them each image has."""

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import UnsupportedModelError

_IMAGE_FIELDS = ("image_token_id", "image_token_index")
_VIDEO_FIELDS = ("video_token_id", "video_token_index")
_VIDEO_TYPE = 2
"""Of a token of a video, in ``mm_token_type_ids``."""


def grid_inputs(config: Any) -> dict[int, str]:
    """For each placeholder the argument of a call that holds the grids of its pictures, if they have any."""
    named = ((_IMAGE_FIELDS, "image_grid_thw"), (_VIDEO_FIELDS, "video_grid_thw"))
    return {token: name for fields, name in named if (token := _placeholder(config, fields)) is not None}


def _placeholder(config: Any, fields: tuple[str, ...]) -> int | None:
    return next((token for name in fields if (token := getattr(config, name, None)) is not None), None)


def placeholder_of(config: Any, kind: str) -> int | None:
    """Id of the placeholder of features of an ``"image"`` or a ``"video"``; None if a model takes none."""
    return _placeholder(config, {"image": _IMAGE_FIELDS, "video": _VIDEO_FIELDS}[kind])


def find_visual_token_ids(config: Any) -> tuple[int, ...]:
    """Ids of the placeholders of visual features, from a model's config.

    Raises:
        UnsupportedModelError: the config has none, so the model is no vision-language model.
    """
    ids = {
        token
        for name in (*_IMAGE_FIELDS, *_VIDEO_FIELDS)
        if (token := getattr(config, name, None)) is not None
    }
    if not ids:
        raise UnsupportedModelError(
            f"{type(config).__name__} names no image or video token; expected a vision-language model with one of "
            f"{', '.join((*_IMAGE_FIELDS, *_VIDEO_FIELDS))} in its config."
        )
    return tuple(sorted(ids))


def tokens_per_image(config: Any, inputs: Mapping[str, Any]) -> dict[int, list[int]]:
    """How many visual tokens each image and each video has, by the id of its placeholder and in order.

    Args:
        config: a model's config.
        inputs: what the model is called with. `generate` encodes the images first and gives the model
            ``mm_encoder_outputs`` in their place.

    Returns:
        An id is missing where the inputs alone don't tell, as with tiles and newline tokens.
    """
    found: dict[int, list[int]] = {}
    encoded = inputs.get("mm_encoder_outputs") or {}
    for fields, modality, grid, pixels in (
        (_IMAGE_FIELDS, "image", "image_grid_thw", "pixel_values"),
        (_VIDEO_FIELDS, "video", "video_grid_thw", "pixel_values_videos"),
    ):
        token = _placeholder(config, fields)
        features = getattr(encoded.get(modality), "pooler_output", None)
        if token is None or (inputs.get(pixels) is None and features is None):
            continue
        if features is not None:
            if not isinstance(features, torch.Tensor) or features.ndim == 3:
                # A row of text among rows with pictures may count as a picture without tokens.
                found[token] = [len(image) for image in features if len(image)]
        elif inputs.get(grid) is not None:
            merge = getattr(config.vision_config, "spatial_merge_size", None)
            if merge is not None:
                found[token] = (inputs[grid].prod(dim=-1) // merge**2).tolist()
        elif has_fixed_size(config) and inputs.get("image_sizes") is None and inputs[pixels].ndim == 4:
            images, _, height, width = inputs[pixels].shape
            patch = config.vision_config.patch_size
            whole = config.vision_feature_select_strategy == "full"  # with the CLS token
            found[token] = [(height // patch) * (width // patch) + whole] * images
    return found


def name_videos(config: Any, ids: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Ids of a prompt in which each video has the placeholder of videos.

    GLM-4V fills the frames of videos with the placeholder of images; the types of the tokens tell them apart.

    Args:
        config: a model's config.
        ids: ``[B, S]`` on the host.
        inputs: what the model is called with.
    """
    image, video = (_placeholder(config, fields) for fields in (_IMAGE_FIELDS, _VIDEO_FIELDS))
    encoded = (inputs.get("mm_encoder_outputs") or {}).get("video")
    types = inputs.get("mm_token_type_ids")
    if (inputs.get("pixel_values_videos") is None and encoded is None) or types is None or video is None:
        return ids
    return ids.masked_fill((ids == image) & (types.to(ids.device) == _VIDEO_TYPE), video)


def has_fixed_size(config: Any) -> bool:
    """Whether an image is one token for each patch of a CLIP tower, as in LLaVA-1.5."""
    return bool(config.model_type == "llava" and config.vision_config.model_type == "clip_vision_model")


def has_grids(config: Any) -> bool:
    """Whether pictures have any size, a feature for each cell of patches; from a model's config."""
    vision = getattr(config, "vision_config", None)
    # With deepstack, features of inner layers enter the decoder too.
    return hasattr(vision, "spatial_merge_size") and not hasattr(vision, "deepstack_visual_indexes")
