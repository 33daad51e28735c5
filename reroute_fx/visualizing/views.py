"""What there is to draw: each picture of a prompt, and what became of its visual tokens at each decision."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..errors import InputError, UnsupportedModelError
from ..selection.selection_result import Routing

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class StageView:
    """The visual tokens of a picture at a decision, each `[rows, columns]` as they lie on the picture.

    Attributes:
        first_layer, last_layer: of the stage.
        kept: ran through the stage, bool.
        returned: kept, but not by the decision before, bool.
        scores: float32; nan where a token was no candidate.
    """

    first_layer: int
    last_layer: int
    kept: Array
    returned: Array
    scores: Array


@dataclass(frozen=True)
class PictureView:
    """A picture as the model saw it, and the stages.

    Attributes:
        picture: `[H, W, 3]` uint8.
        stages: one for each decision.
        deletes: whether what is not kept is gone for good.
    """

    picture: Array
    stages: tuple[StageView, ...]
    deletes: bool


def view_rows(
    config: Any, inputs: Mapping[str, Any], routing: Routing, processor: Any = None
) -> list[list[PictureView]]:
    """The pictures of each row of a batch, with what was routed.

    Args:
        config: of the model.
        inputs: of the model, images only.
        routing: what a call with them returned.
        processor: tells how pixels were normalised; without one CLIP's numbers are taken.

    Raises:
        UnsupportedModelError: tokens and patches of a picture don't correspond one to one.
    """
    pictures = _pictures(config, inputs, *_normalisation(processor))
    counts = [tokens for row in routing.plan.images for tokens in row]
    sizes = [grid[0] * grid[1] for _, grid in pictures]
    if counts != sizes:
        raise UnsupportedModelError(
            f"The pictures have {sizes} merged patches and {counts} visual tokens; expected one token for each. "
            f"Models with tiles or newline tokens can't be drawn."
        )
    remaining = iter(pictures)
    views = []
    for number, row in enumerate(routing.plan.images):
        starts = np.cumsum([0, *row])
        views.append(
            [
                _view(routing, number, slice(start, start + count), *next(remaining))
                for start, count in zip(starts, row, strict=False)
            ]
        )
    return views


def _view(routing: Routing, row: int, tokens: slice, picture: Array, grid: tuple[int, int]) -> PictureView:
    layers = routing.config.decision_layers
    ends = [*layers[1:], routing.num_layers]
    stages, before = [], np.ones(grid, dtype=bool)
    for layer, end in zip(layers, ends, strict=True):
        kept = routing.all_kept[layer][row, tokens].cpu().numpy().reshape(grid)
        scores = routing.all_scores[layer][row, tokens].float().cpu().numpy().reshape(grid)
        scores = np.where(np.isfinite(scores), scores, np.nan)
        stages.append(StageView(layer, end - 1, kept, kept & ~before, scores))
        before = kept
    return PictureView(picture, tuple(stages), routing.config.action == "physical_delete")


def _normalisation(processor: Any) -> tuple[Array, Array]:
    images = getattr(processor, "image_processor", None)
    mean = getattr(images, "image_mean", None) or OPENAI_CLIP_MEAN
    std = getattr(images, "image_std", None) or OPENAI_CLIP_STD
    return np.array(mean), np.array(std)


def _pictures(
    config: Any, inputs: Mapping[str, Any], mean: Array, std: Array
) -> list[tuple[Array, tuple[int, int]]]:
    """Each picture out of its pixel values, with the rows and columns of its visual tokens."""
    pixels, grids = inputs["pixel_values"], inputs.get("image_grid_thw")
    if grids is None:
        if pixels.ndim != 4:
            raise UnsupportedModelError(
                f"pixel_values has {pixels.ndim} dimensions; expected one picture [3, H, W] for each image. Models "
                f"with tiles can't be drawn."
            )
        patch = config.vision_config.patch_size
        grid = (pixels.shape[2] // patch, pixels.shape[3] // patch)
        return [(_to_bytes(each, mean, std), grid) for each in pixels]
    vision = config.vision_config
    found = []
    for part, (_, height, width) in zip(pixels.split(grids.prod(1).tolist()), grids.tolist(), strict=True):
        merged = (height // vision.spatial_merge_size, width // vision.spatial_merge_size)
        found.append((_to_bytes(_join_patches(part, merged, vision), mean, std), merged))
    return found


def _join_patches(patches: torch.Tensor, grid: tuple[int, int], vision: Any) -> torch.Tensor:
    """The first frame `[3, H, W]` out of patches `[T * H * W, 3 * frames * side * side]` in merged order."""
    side, merge = vision.patch_size, vision.spatial_merge_size
    rows, columns = grid
    frame = patches[: rows * columns * merge**2]
    parts = frame.reshape(rows, columns, merge, merge, 3, vision.temporal_patch_size, side, side)[
        :, :, :, :, :, 0
    ]
    return parts.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * merge * side, columns * merge * side)


def _to_bytes(pixels: torch.Tensor, mean: Array, std: Array) -> Array:
    values = pixels.float().cpu().numpy().transpose(1, 2, 0) * std + mean
    return (values.clip(0, 1) * 255).round().astype(np.uint8)


def enlarge(values: Array, size: tuple[int, int], smooth: bool = False) -> Array:
    """Values of tokens `[rows, columns]` on the pixels `[H, W]` of a picture, float32."""
    how = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(values.astype(np.float32)).resize((size[1], size[0]), how))


def check_views(inputs: Mapping[str, Any]) -> None:
    """Raise InputError unless the inputs hold pictures, and no videos."""
    if inputs.get("pixel_values_videos") is not None:
        raise InputError("inputs hold pixel_values_videos; expected pictures only. Videos can't be drawn.")
    if not isinstance(inputs.get("pixel_values"), torch.Tensor):
        raise InputError(
            "inputs hold no pixel_values; expected pictures. Pass what the processor made of prompts with pictures."
        )
