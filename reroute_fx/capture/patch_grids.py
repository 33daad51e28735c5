"""Pictures as patches, one behind another, with a grid of each: ``[n, 3]``, patches in time, height and width."""

from collections.abc import Mapping, Sequence

import torch

from ..errors import InputError
from .picture_order import pictures_per_row, repeated


def check_grids(
    pixel_values: torch.Tensor, grid: torch.Tensor | None, values: Sequence[int], merge: int
) -> torch.Tensor:
    """The grids, if they are those of such patches.

    Args:
        pixel_values: ``[patches, *values]``.
        grid: on the host.
        values: shape of a patch.
        merge: patches along an edge that become one feature.

    Raises:
        InputError: there are no grids, or they have other patches.
    """
    if grid is None or grid.ndim != 2 or grid.shape[1] != 3:
        raise InputError(
            "Pictures came without their grids; expected image_grid_thw or video_grid_thw, [pictures, 3], as the "
            "processor returns them."
        )
    expected = int(grid.prod(dim=-1).sum()), *values
    if tuple(pixel_values.shape) != expected:
        raise InputError(
            f"pixel_values has shape {list(pixel_values.shape)}, but the grids have {expected[0]} patches of "
            f"{' x '.join(map(str, values))} values. Pass what the model's processor returns."
        )
    if (grid < 1).any() or (grid[:, 1:] % merge).any():
        raise InputError(
            f"A grid is {grid.tolist()}; expected heights and widths in multiples of {merge}. Pass what the "
            f"model's processor returns."
        )
    if expected[0] == merge**2:
        raise InputError("The only picture is a single visual token; expected two or more. Pass it larger.")
    return grid


def features_of(grid: torch.Tensor, merge: int) -> list[int]:
    """Features of each picture."""
    return [int(patches) // merge**2 for patches in grid.prod(dim=-1)]


def repeat_patches(
    given: Mapping[str, torch.Tensor], names: Sequence[str], tokens: Sequence[int], times: int, merge: int
) -> dict[str, torch.Tensor]:
    """See `Images.repeat`; the second of `names` is that of the grids."""
    grid = given[names[1]]
    order = repeated(pictures_per_row(tokens, features_of(grid, merge)), times)
    pixels = given[names[0]].split(grid.prod(dim=-1).tolist())
    rest = {name: given[name][order] for name in names[1:] if name in given}
    return {names[0]: torch.cat([pixels[i] for i in order]), **rest}
