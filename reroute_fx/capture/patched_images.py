"""Pictures as patches whose rows and columns are sizes of what the program is given."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.export import Dim

from ..errors import InputError
from .patch_grids import check_grids, features_of, repeat_patches
from .picture_order import sample_pixels


@dataclass(frozen=True)
class PatchedImages:
    """Pictures of any size as patches, ``pixel_values [patches, *values]``, with a grid ``[n, 3]`` of each.

    Each runs by itself, as ``[rows, columns, *values]``, which tells the program its grid. No videos.

    Attributes:
        values: shape of a patch.
        merge: patches along an edge that become one feature.
    """

    values: tuple[int, ...]
    merge: int
    kind: Literal["patched"] = "patched"

    @property
    def takes_videos(self) -> bool:
        return False

    @property
    def shapes(self) -> dict[str, dict[int, Any]]:
        return {"pixel_values": {0: self.merge * Dim("rows", min=2), 1: self.merge * Dim("columns", min=2)}}

    def inputs(self, pixel_values: torch.Tensor, grid: torch.Tensor | None) -> dict[str, torch.Tensor]:
        assert grid is not None
        ((_, height, width),) = grid.tolist()
        return {"pixel_values": pixel_values.unflatten(0, (height, width))}

    def apart(
        self, pixel_values: torch.Tensor, grid: torch.Tensor | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        assert grid is not None
        yield from zip(pixel_values.split(grid.prod(dim=-1).tolist()), grid.split(1), strict=True)

    def sample(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        grid = torch.tensor([[1, 4 * self.merge, 5 * self.merge], [1, 2 * self.merge, 3 * self.merge]])
        return sample_pixels(int(grid.prod(dim=-1).sum()), *self.values), grid

    def check(self, pixel_values: torch.Tensor, grid: torch.Tensor | None) -> None:
        grid = check_grids(pixel_values, grid, self.values, self.merge)
        if (grid[:, 0] != 1).any() or (grid[:, 1:] < 2 * self.merge).any():
            raise InputError(
                f"The grids of pictures are {grid.tolist()}; expected one frame, and {2 * self.merge} patches or more "
                f"in height and width. Pass them larger, and videos to the model that was exported."
            )

    def sizes(self, pixel_values: torch.Tensor, grid: torch.Tensor | None) -> list[int]:
        assert grid is not None
        return features_of(grid, self.merge)

    def repeat(
        self, given: Mapping[str, torch.Tensor], names: Sequence[str], tokens: Sequence[int], times: int
    ) -> dict[str, torch.Tensor]:
        return repeat_patches(given, names, tokens, times, self.merge)
