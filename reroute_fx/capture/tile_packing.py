"""How a model lays out the features of the tiles of its pictures, found by asking its own code."""

import copy
import inspect
import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..errors import UnsupportedModelError
from .cropped_images import CroppedImages, lay_out, mark_whole

_SHARES = ((7, 7), (5, 7), (7, 5), (1, 7), (7, 1), (1, 1))
"""Heights and widths of pictures that are laid out, in sevenths of each resolution."""
_WIDTH = 3
"""Of the features that are laid out."""


def find_packing(model: Any) -> CroppedImages | None:
    """How a model takes tiles; None if it has no end of a line, or no resolutions that pictures are fitted into.

    Raises:
        UnsupportedModelError: it lays them out in another way than is known.
    """
    inner, config = model.base_model, model.config
    resolutions, newline = (
        getattr(config, "image_grid_pinpoints", None),
        getattr(inner, "image_newline", None),
    )
    if not resolutions or newline is None:
        return None
    vision = config.vision_config
    known = CroppedImages(
        channels=getattr(vision, "num_channels", 3),
        edge=vision.image_size,
        side=vision.image_size // vision.patch_size,
        resolutions=tuple((height, width) for height, width in resolutions),
    )
    asked = _with_any_tower(model, known)
    candidates = [known, replace(known, most=_most(config))]
    found = next((images for images in candidates if _agree(_pictures(asked, images))), None)
    if found is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} lays out the features of tiles (image_newline, image_grid_pinpoints) in another "
            f"way than LLaVA-NeXT and LLaVA-OneVision do; expected the whole picture, then its lines without padding. "
            f"It can't be exported; use reroute_fx.compile."
        )
    with_videos = replace(found, takes_videos=True)
    return with_videos if _agree(_videos(asked, with_videos)) else found


def _most(config: Any) -> int | None:
    """Tiles' worth of features above which a config lets them be averaged, as in ``anyres_max_9``."""
    named = re.fullmatch(r"anyres_max_(\d+)", str(getattr(config, "vision_aspect_ratio", "")))
    return int(named[1]) if named else None


@torch.no_grad()
def _agree(pairs: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    try:
        return all(
            found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)
            for found, expected in pairs
        )
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # Of the model's own code.
        return False


def _pictures(asked: Any, images: CroppedImages) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Features of pictures of many sizes, as `images` says and as the model has them."""
    encode = asked.get_image_features
    for (height, width), (tall, broad) in itertools.product(images.resolutions, _SHARES):
        grid = torch.tensor([[max(1, height * tall // 7), max(1, width * broad // 7)]])
        tiles = torch.zeros(1, max(images.tiles_of(grid)), 1, 1, 1)
        expected = encode(pixel_values=tiles, image_sizes=grid).pooler_output
        yield _laid_out(asked, images, tiles, grid), torch.cat(list(expected))
    if "batch_num_images" in inspect.signature(encode).parameters:
        grid, groups, tiles = torch.tensor([[9, 5], [5, 9]]), torch.tensor([2]), torch.zeros(2, 1, 1, 1, 1)
        expected = encode(pixel_values=tiles, image_sizes=grid, batch_num_images=groups).pooler_output
        yield _laid_out(asked, images, tiles, mark_whole(grid, groups)), torch.cat(list(expected))


def _videos(asked: Any, images: CroppedImages) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Features of two videos of three frames."""
    frames = torch.zeros(2, 3, 1, 1, 1)
    expected = asked.get_video_features(pixel_values_videos=frames).pooler_output
    yield _laid_out(asked, images, frames, None), torch.cat(list(expected))


def _laid_out(
    asked: Any, images: CroppedImages, tiles: torch.Tensor, grid: torch.Tensor | None
) -> torch.Tensor:
    given = images.inputs(tiles, grid)
    of_tiles = asked.multi_modal_projector(asked.vision_tower.features(len(given["pixel_values"])))
    return lay_out(of_tiles, asked.image_newline, given["places"], given.get("weights"))


def _with_any_tower(model: Any, images: CroppedImages) -> Any:
    """The model with a tower and a projector that know no picture and treat each feature alone."""
    asked = copy.copy(model.base_model)
    asked._parameters = {
        **asked._parameters,
        "image_newline": nn.Parameter(torch.full((_WIDTH,), 2.0, dtype=torch.float64)),
    }
    first = 1 if model.config.vision_feature_select_strategy == "default" else 0
    parts = {
        "vision_tower": _AnyTower(first, images.side**2, model.config.vision_config.num_hidden_layers),
        "multi_modal_projector": _Bent(),
    }
    asked._modules = {**asked._modules, **parts}
    return asked


class _AnyTower(nn.Module):
    """Hidden states of any tiles: random, the same in each layer."""

    def __init__(self, first: int, tokens: int, layers: int) -> None:
        super().__init__()
        self.first, self.tokens, self.layers = first, tokens, layers

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutputWithPooling:
        states = nn.functional.pad(self.features(len(pixel_values)), (0, 0, self.first, 0))
        return BaseModelOutputWithPooling(hidden_states=(states,) * (self.layers + 1))

    def features(self, tiles: int) -> torch.Tensor:
        """In double precision: rounded places of means would look like others."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(tiles, self.tokens, _WIDTH, generator=generator, dtype=torch.float64)


class _Bent(nn.Module):
    """A projector that is not linear: what is averaged before it is not what is averaged behind it."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features[..., :_WIDTH].sin()
