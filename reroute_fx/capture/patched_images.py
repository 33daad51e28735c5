"""Pictures as patches whose rows and columns are sizes of what the program is given."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.export import Dim

from ..errors import InputError
from .patch_grids import check_grids, features_of, repeat_patches
from .picture_order import pictures_per_row, repeated, sample_pixels


@dataclass(frozen=True)
class PatchedImages:
    """Pictures of any size as patches, ``pixel_values [patches, *values]``, with a grid ``[n, 3]`` of each.

    Each runs by itself, as ``[rows, columns, *values]``, which tells the program its grid. No videos.

    Attributes:
        values: shape of a patch.
        merge: patches along an edge that become one feature.
        padded: whether there are as many patches of each picture, ``pixel_values [n, patches, *values]``, those behind
            its own for nobody, and of each grid rows and columns only, ``spatial_shapes [n, 2]``.
    """

    values: tuple[int, ...]
    merge: int
    padded: bool = False
    kind: Literal["patched"] = "patched"

    @property
    def takes_videos(self) -> bool:
        return False

    @property
    def shapes(self) -> dict[str, dict[int, Any]]:
        return {"pixel_values": {0: self.merge * Dim("rows", min=2), 1: self.merge * Dim("columns", min=2)}}

    def inputs(self, pixel_values: torch.Tensor, grid: torch.Tensor | None) -> dict[str, torch.Tensor]:
        assert grid is not None
        ((height, width),) = grid[:, -2:].tolist()
        return {"pixel_values": pixel_values.unflatten(0, (height, width))}

    def apart(
        self, pixel_values: torch.Tensor, grid: torch.Tensor | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        assert grid is not None
        counts = grid.prod(dim=-1).tolist()
        if self.padded:
            pictures = [picture[:count] for picture, count in zip(pixel_values, counts, strict=True)]
        else:
            pictures = list(pixel_values.split(counts))
        yield from zip(pictures, grid.split(1), strict=True)

    def sample(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        grid = torch.tensor([[1, 4, 5], [1, 2, 3]]) * torch.tensor([1, self.merge, self.merge])
        if self.padded:
            return sample_pixels(2, 20 * self.merge**2, *self.values), grid[:, 1:]
        return sample_pixels(int(grid.prod(dim=-1).sum()), *self.values), grid

    def check(self, pixel_values: torch.Tensor, grid: torch.Tensor | None) -> None:
        if self.padded:
            grid = self._padded_grids(pixel_values, grid)
        else:
            grid = check_grids(pixel_values, grid, self.values, self.merge)
        if (grid[:, 0] != 1).any() or (grid[:, 1:] < 2 * self.merge).any():
            raise InputError(
                f"The grids of pictures are {grid.tolist()}; expected one frame, and {2 * self.merge} patches or more "
                f"in height and width. Pass them larger, and videos to the model that was exported."
            )

    def _padded_grids(self, pixel_values: torch.Tensor, grid: torch.Tensor | None) -> torch.Tensor:
        """``[n, 3]``."""
        if pixel_values.ndim != 2 + len(self.values) or tuple(pixel_values.shape[2:]) != self.values:
            raise InputError(
                f"pixel_values has shape {list(pixel_values.shape)}; expected [pictures, patches, "
                f"{', '.join(map(str, self.values))}]. Pass what the model's processor returns."
            )
        most = pixel_values.shape[1]
        if grid is None or grid.shape != (len(pixel_values), 2) or (grid.prod(dim=-1) > most).any():
            raise InputError(
                f"spatial_shapes are {None if grid is None else grid.tolist()}; expected rows and columns of each of "
                f"{len(pixel_values)} pictures, of up to {most} patches. Pass what the model's processor returns."
            )
        if (grid % self.merge).any():
            raise InputError(
                f"spatial_shapes are {grid.tolist()}; expected multiples of {self.merge}. Pass what the model's "
                f"processor returns."
            )
        return torch.nn.functional.pad(grid, (1, 0), value=1)

    def sizes(self, pixel_values: torch.Tensor, grid: torch.Tensor | None) -> list[int]:
        assert grid is not None
        return features_of(grid, self.merge)

    def repeat(
        self, given: Mapping[str, torch.Tensor], names: Sequence[str], tokens: Sequence[int], times: int
    ) -> dict[str, torch.Tensor]:
        if not self.padded:
            return repeat_patches(given, names, tokens, times, self.merge)
        sizes = features_of(given["spatial_shapes"], self.merge)
        order = repeated(pictures_per_row(tokens, sizes), times)
        return {name: given[name][order] for name in names if name in given}
