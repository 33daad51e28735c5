"""How a model takes pictures: what its vision tower needs to know of them, and whether it can take them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch.export import Dim
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from ..errors import InputError
from ..methods.tiers import entering
from .cropped_images import CroppedImages
from .patch_grids import check_grids, features_of, repeat_patches
from .patched_images import PatchedImages
from .picture_order import pictures_per_row, repeated, sample_pixels
from .segments import segments


class Images(Protocol):
    """How a model takes pictures."""

    @property
    def kind(self) -> str:
        """``"fixed"``, ``"tiled"``, ``"cropped"``, ``"grid"``, ``"patched"`` or ``"sized"``."""

    @property
    def takes_videos(self) -> bool:
        """Whether the program makes features of videos, too."""

    @property
    def shapes(self) -> dict[str, dict[int, Any]]:
        """Dynamic dimensions of the inputs of the program."""

    def inputs(self, pixel_values: torch.Tensor, grid: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Inputs of the program that `capture_vision_tower` returns; `grid` is on the host."""

    def apart(
        self, pixel_values: torch.Tensor, grid: torch.Tensor | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Pictures that run together, and their grid."""

    def sample(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Two pictures, of different sizes if they may have any: `pixel_values` in float32, and their grid."""

    def check(self, pixel_values: torch.Tensor, grid: torch.Tensor | None) -> None:
        """Raise InputError unless the model can take such pictures."""

    def sizes(self, pixel_values: torch.Tensor, grid: torch.Tensor | None) -> list[int]:
        """Features of each picture."""

    def repeat(
        self, given: Mapping[str, torch.Tensor], names: Sequence[str], tokens: Sequence[int], times: int
    ) -> dict[str, torch.Tensor]:
        """The pictures of each row `times` times.

        Args:
            given: pixels, grids and what else has an entry for each picture.
            names: those of `given`, in that order.
            tokens: placeholders of each row.
            times: at least 1.
        """


def encode(
    program: Callable[..., dict[str, torch.Tensor]],
    images: Images,
    pixel_values: torch.Tensor,
    grid: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """What a tower makes of pictures, those of all of them in order.

    Args:
        program: takes what `Images.inputs` returns.
        images: how it takes pictures.
        pixel_values: of the pictures.
        grid: of the pictures, on the host.
    """
    made = [program(**images.inputs(*part)) for part in images.apart(pixel_values, grid)]
    if len(made) == 1:
        return made[0]
    return {name: torch.cat([each[name] for each in made], dim=-2) for name in made[0]}


def encoded(output: Any) -> dict[str, torch.Tensor]:
    """Features of all pictures in order, of ``[n, t, d]`` or of one ``[t, d]`` for each, as a tower's program has them.

    Args:
        output: of a model's `get_image_features`.
    """
    found = output.pooler_output
    return {"features": found.flatten(0, 1) if isinstance(found, torch.Tensor) else torch.cat(list(found))}


@dataclass(frozen=True)
class _OneSize:
    """What a program takes ``[n, channels, height, width]`` of, with `tokens` features of each."""

    channels: int
    height: int
    width: int
    tokens: int

    @property
    def takes_videos(self) -> bool:
        return False

    @property
    def shapes(self) -> dict[str, dict[int, Any]]:
        return {"pixel_values": {0: Dim.DYNAMIC}}

    def inputs(self, pixel_values: torch.Tensor, grid: torch.Tensor | None) -> dict[str, torch.Tensor]:
        return {"pixel_values": pixel_values}


@dataclass(frozen=True)
class FixedImages(_OneSize):
    """Pictures of one size, ``pixel_values [n, channels, height, width]``.

    Attributes:
        tokens: features of each.
    """

    kind: Literal["fixed"] = "fixed"

    def apart(
        self, pixel_values: torch.Tensor, grid: torch.Tensor | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        yield pixel_values, grid

    def sample(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return sample_pixels(2, self.channels, self.height, self.width), None

    def check(self, pixel_values: torch.Tensor, grid: torch.Tensor | None) -> None:
        expected = self.channels, self.height, self.width
        if tuple(pixel_values.shape[1:]) != expected:
            raise InputError(
                f"pixel_values has shape {list(pixel_values.shape)}; expected pictures of size {list(expected)}. Pass "
                f"what the model's processor returns."
            )

    def sizes(self, pixel_values: torch.Tensor, grid: torch.Tensor | None) -> list[int]:
        return [self.tokens] * len(pixel_values)

    def repeat(
        self, given: Mapping[str, torch.Tensor], names: Sequence[str], tokens: Sequence[int], times: int
    ) -> dict[str, torch.Tensor]:
        (pixels,) = given.values()
        order = repeated([row // self.tokens for row in tokens], times)
        return {names[0]: pixels[order]}


@dataclass(frozen=True)
class TiledImages(_OneSize):
    """Tiles of one size, those of each row of a prompt apart, ``pixel_values [B, tiles, channels, height, width]``.

    Tiles of zeros fill up rows that have fewer.

    Attributes:
        tokens: features of each tile.
    """

    kind: Literal["tiled"] = "tiled"

    def apart(
        self, pixel_values: torch.Tensor, grid: torch.Tensor | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        tiles = pixel_values.flatten(0, 1)
        yield tiles[tiles.flatten(1).any(dim=1)], None

    def sample(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        pixels = sample_pixels(2, 2, self.channels, self.height, self.width)
        pixels[1, 1] = 0
        return pixels, None

    def check(self, pixel_values: torch.Tensor, grid: torch.Tensor | None) -> None:
        expected = self.channels, self.height, self.width
        if pixel_values.ndim != 5 or tuple(pixel_values.shape[2:]) != expected or not pixel_values.any():
            raise InputError(
                f"pixel_values has shape {list(pixel_values.shape)}; expected [batch, tiles, "
                f"{', '.join(map(str, expected))}], not all of them zeros. Pass what the model's processor returns, "
                f"with tiles of that size."
            )

    def sizes(self, pixel_values: torch.Tensor, grid: torch.Tensor | None) -> list[int]:
        tiles: list[int] = pixel_values.flatten(2).any(dim=2).sum(dim=1).tolist()
        return [count * self.tokens for count in tiles]

    def repeat(
        self, given: Mapping[str, torch.Tensor], names: Sequence[str], tokens: Sequence[int], times: int
    ) -> dict[str, torch.Tensor]:
        return {name: given[name].repeat_interleave(times, dim=0) for name in names if name in given}


@dataclass(frozen=True)
class GridImages:
    """Pictures and videos of any size as patches, ``pixel_values [patches, values]``, with a grid ``[n, 3]`` of each.

    Attributes:
        values: of a patch.
        merge: patches along an edge that become one feature.
        patch: pixels along the edge of a patch.
        window: pixels along the edge of an attention window; None if every layer sees whole frames.
        table: places along the edge of the learned table of positions, which is stretched over each picture; None if
            there is none.
        stretch: how: ``"bilinear"`` from corner to corner, or ``"bicubic"`` from edge to edge.
        share: of each picture's features that stay; then the program is told the features of each frame, and how many
            of them stay. None if all do.
    """

    values: int
    merge: int
    patch: int
    window: int | None
    table: int | None = None
    stretch: Literal["bilinear", "bicubic"] = "bilinear"
    share: float | None = None
    kind: Literal["grid"] = "grid"

    @property
    def shapes(self) -> dict[str, dict[int, Any]]:
        features = Dim("features", min=2)
        patches = {0: self.merge**2 * features}
        segments = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
        return {
            "pixel_values": patches,
            "position_ids": patches,
            "table_places": patches,
            "table_weights": patches,
            "window_order": {0: features},
            "frames": segments,
            "windows": segments,
        }

    @property
    def takes_videos(self) -> bool:
        return True

    def inputs(self, pixel_values: torch.Tensor, grid: torch.Tensor | None) -> dict[str, torch.Tensor]:
        assert grid is not None
        bounds = get_vision_cu_seqlens(grid)
        given = {"position_ids": get_vision_position_ids(grid, self.merge), "frames": segments(bounds)}
        if self.table is not None:
            places, weights = get_vision_interpolation_indices_and_weights(
                grid,
                self.table,
                mode=self.stretch,
                align_corners=self.stretch == "bilinear",
                spatial_merge_size=self.merge,
            )
            given |= {"table_places": places, "table_weights": weights}
        if self.window is not None:
            order, edges = get_vision_window_index(grid, self.merge, self.window, self.patch)
            given |= {"window_order": order, "windows": segments(edges)}
        if self.share is not None:
            ends = bounds // self.merge**2
            given["feature_frames"] = segments(ends)
            given["feature_counts"] = torch.tensor([entering(n, self.share) for n in ends.diff().tolist()])
        placed = {name: tensor.to(pixel_values.device) for name, tensor in given.items()}
        return {"pixel_values": pixel_values, **placed}

    def apart(
        self, pixel_values: torch.Tensor, grid: torch.Tensor | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        yield pixel_values, grid

    def sample(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        grid = torch.tensor([[1, 4 * self.merge, 5 * self.merge], [2, 2 * self.merge, 3 * self.merge]])
        return sample_pixels(int(grid.prod(dim=-1).sum()), self.values), grid

    def check(self, pixel_values: torch.Tensor, grid: torch.Tensor | None) -> None:
        check_grids(pixel_values, grid, [self.values], self.merge)

    def sizes(self, pixel_values: torch.Tensor, grid: torch.Tensor | None) -> list[int]:
        assert grid is not None
        return features_of(grid, self.merge)

    def repeat(
        self, given: Mapping[str, torch.Tensor], names: Sequence[str], tokens: Sequence[int], times: int
    ) -> dict[str, torch.Tensor]:
        return repeat_patches(given, names, tokens, times, self.merge)


@dataclass(frozen=True)
class SizedImages:
    """Pictures of any size, ``pixel_values [n, channels, height, width]``, padded to that of the largest.

    Their ``image_sizes [n, 2]``, height and width in pixels, stand for a grid. Each runs by itself.

    Attributes:
        unit: pixels along the edge of what becomes one feature.
    """

    channels: int
    unit: int
    kind: Literal["sized"] = "sized"

    @property
    def takes_videos(self) -> bool:
        return False

    @property
    def shapes(self) -> dict[str, dict[int, Any]]:
        return {"pixel_values": {2: self.unit * Dim("rows", min=2), 3: self.unit * Dim("columns", min=2)}}

    def inputs(self, pixel_values: torch.Tensor, grid: torch.Tensor | None) -> dict[str, torch.Tensor]:
        return {"pixel_values": pixel_values}

    def apart(
        self, pixel_values: torch.Tensor, grid: torch.Tensor | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        assert grid is not None
        for picture, (height, width) in zip(pixel_values, grid.tolist(), strict=True):
            yield picture[None, :, :height, :width].contiguous(), None

    def sample(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        grid = torch.tensor([[3 * self.unit, 4 * self.unit], [2 * self.unit, 3 * self.unit]])
        return sample_pixels(2, self.channels, 3 * self.unit, 4 * self.unit), grid

    def check(self, pixel_values: torch.Tensor, grid: torch.Tensor | None) -> None:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.channels:
            raise InputError(
                f"pixel_values has shape {list(pixel_values.shape)}; expected [pictures, {self.channels}, height, "
                f"width]. Pass what the model's processor returns."
            )
        if grid is None or grid.shape != (len(pixel_values), 2):
            given = None if grid is None else list(grid.shape)
            raise InputError(
                f"image_sizes has shape {given}; expected [{len(pixel_values)}, 2], height and width of each picture. "
                f"Pass what the model's processor returns."
            )
        largest = torch.tensor(pixel_values.shape[2:])
        if (grid < 2 * self.unit).any() or (grid % self.unit).any() or (grid > largest).any():
            raise InputError(
                f"image_sizes are {grid.tolist()}; expected heights and widths in multiples of {self.unit}, two or "
                f"more, within the {largest.tolist()} of pixel_values. Pass what the model's processor returns."
            )

    def sizes(self, pixel_values: torch.Tensor, grid: torch.Tensor | None) -> list[int]:
        assert grid is not None
        found: list[int] = (grid // self.unit).prod(dim=-1).tolist()
        return found

    def repeat(
        self, given: Mapping[str, torch.Tensor], names: Sequence[str], tokens: Sequence[int], times: int
    ) -> dict[str, torch.Tensor]:
        sizes = self.sizes(given[names[0]], given[names[1]])
        order = repeated(pictures_per_row(tokens, sizes), times)
        return {name: given[name][order] for name in names if name in given}


AnyImages = FixedImages | TiledImages | CroppedImages | GridImages | PatchedImages | SizedImages
