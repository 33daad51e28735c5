"""Towers that take patches and grids, by their own code, where that computes with the sizes of pictures only."""

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from .copies import without
from .image_layout import encoded
from .known_sizes import KnownSizes
from .patched_images import PatchedImages
from .picture_order import sample_pixels

WHOLE = "flash_whole"
"""Name of the implementation; models hand one with "flash" in its name all patches at once."""
_EDGE = 12
"""Patches along the edge of a picture that is tried; what are merged divide it."""


class PatchedTower(nn.Module):
    """From a picture ``pixel_values [rows, columns, *values]`` to features, by the model's own `get_image_features`."""

    attention = WHOLE

    def __init__(self, model: PreTrainedModel, padded: bool) -> None:
        super().__init__()
        self.vision: Any = without(model.base_model, model.get_decoder())
        self.padded = padded

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        height, width = pixel_values.shape[:2]
        patches, device = pixel_values.flatten(0, 1), pixel_values.device
        if self.padded:
            return encoded(
                self.vision.get_image_features(
                    pixel_values=patches[None],
                    spatial_shapes=KnownSizes([[height, width]], device),
                    pixel_attention_mask=_NoPadding(patches.shape[0], device),
                )
            )
        # The longest sequence is known; any number will do.
        return encoded(
            self.vision.get_image_features(
                pixel_values=patches, image_grid_thw=KnownSizes([[1, height, width]], device), max_seqlen=1
            )
        )

    def expected(self, model: Any, pixel_values: torch.Tensor, grid: torch.Tensor) -> dict[str, torch.Tensor]:
        return _features(model.base_model.get_image_features, self.padded, pixel_values, grid)


class _NoPadding:
    """Where a model expects the mask of a picture's patches, ``[1, P]``: all are its own."""

    def __init__(self, patches: int, device: torch.device) -> None:
        self.patches, self.device = patches, device

    def sum(self, dim: int) -> KnownSizes:
        return KnownSizes([self.patches], self.device)


def _features(
    encode: Any, padded: bool, pixel_values: torch.Tensor, grid: torch.Tensor
) -> dict[str, torch.Tensor]:
    """By the model's own code."""
    grid = grid.to(pixel_values.device)
    if not padded:
        return encoded(encode(pixel_values=pixel_values, image_grid_thw=grid))
    places = torch.arange(pixel_values.shape[1], device=grid.device)
    mask = (places < grid.prod(dim=-1)[:, None]).long()
    return encoded(encode(pixel_values=pixel_values, spatial_shapes=grid, pixel_attention_mask=mask))


def patched_images(model: Any) -> PatchedImages | None:
    """How a model takes patches, found by giving it some; None if it wants others, or more."""
    inner, vision = model.base_model, getattr(model.config, "vision_config", None)
    encode = getattr(inner, "get_image_features", None)
    taken = set() if encode is None else set(inspect.signature(encode).parameters)
    padded = {"spatial_shapes", "pixel_attention_mask"} <= taken
    if not padded and "image_grid_thw" not in taken:
        return None
    if not isinstance(patch := getattr(vision, "patch_size", None), int):
        return None
    grid = torch.tensor([[_EDGE, _EDGE]] if padded else [[1, _EDGE, _EDGE]])
    for values in _shapes(vision, patch):
        pixels = sample_pixels(*([1] if padded else []), _EDGE**2, *values).to(model.device, model.dtype)
        try:
            with torch.no_grad():
                features = _features(encode, padded, pixels, grid)["features"]
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # Of the model's own code.
            continue
        merge = math.isqrt(_EDGE**2 // max(1, len(features)))
        if len(features) * merge**2 == _EDGE**2:
            return PatchedImages(tuple(values), merge, padded)
    return None


def _shapes(vision: Any, patch: int) -> list[list[int]]:
    """Of a patch, as models take it."""
    names = ("num_channels", "in_channels", "in_chans")
    channels = next((found for name in names if (found := getattr(vision, name, None)) is not None), 3)
    values = channels * patch**2
    return [[channels, patch, patch], [values], [values * getattr(vision, "temporal_patch_size", 1)]]


def attend_to_all(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of the patches ``[1, H, P, D]`` of one picture to all of them, ``[1, P, H, D]``."""
    return F.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2), None


AttentionInterface.register(WHOLE, attend_to_all)
