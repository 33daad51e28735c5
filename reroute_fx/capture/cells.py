"""Where the visual tokens of a picture lie in it: rows and columns, where each token is a cell of a grid."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError
from .visual_tokens import grid_inputs, has_fixed_size, has_grids

Grid = tuple[int, int, int]
"""Frames, rows and columns of a picture's visual tokens, which come in that order."""


def has_cells(config: Any) -> bool:
    """Whether each visual token of a model is a cell of its picture, row by row; from the model's config."""
    if has_fixed_size(config):
        return bool(config.vision_feature_select_strategy == "default")  # without the CLS token
    return has_grids(config)


def grids_of(
    config: Any, given: Mapping[str, Any], pictures: Sequence[Sequence[tuple[int, int]]]
) -> list[list[Grid]]:
    """The grid of each picture of each row.

    Args:
        config: of a model that `has_cells`.
        given: arguments of the call, by name; grids may be those of a prompt of which `generate` repeats the rows.
        pictures: of each row, placeholder and visual tokens of each.

    Raises:
        InputError: the call doesn't say what grid a picture has.
    """
    if has_fixed_size(config):
        side = config.vision_config.image_size // config.vision_config.patch_size
        return [[_square(tokens, side) for _, tokens in row] for row in pictures]
    given = {name: x for name in grid_inputs(config).values() if (x := given.get(name)) is not None}
    left = {token: iter(given[name].tolist()) for token, name in grid_inputs(config).items() if name in given}
    merge = config.vision_config.spatial_merge_size
    # Beams and samples repeat the rows of a prompt, each with its pictures, and not the grids.
    times = max(1, sum(map(len, pictures)) // max(1, sum(map(len, given.values()))))
    grids = []
    for row in pictures[::times]:
        found = [next(left.get(token, iter(())), None) for token, _ in row]
        of_row = [_merged(grid, tokens, merge) for grid, (_, tokens) in zip(found, row, strict=True)]
        grids += [of_row] * times
    return grids


def _square(tokens: int, side: int) -> Grid:
    if tokens != side * side:
        raise InputError(
            f"A picture has {tokens} visual tokens, but rules or blocks ask for rows and columns; expected pictures "
            f"of {side} x {side}, and text between them if only visual_mask tells them apart."
        )
    return 1, side, side


def _merged(grid: Sequence[int] | None, tokens: int, merge: int) -> Grid:
    if grid is None or math.prod(grid) != tokens * merge**2:
        raise InputError(
            f"A picture of {tokens} visual tokens came with the grid {grid}, but rules or blocks ask for rows and "
            f"columns; expected image_grid_thw or video_grid_thw with a grid for each picture. Pass what the processor "
            f"returned."
        )
    frames, height, width = grid
    return frames, height // merge, width // merge
