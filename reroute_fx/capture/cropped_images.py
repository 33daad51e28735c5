"""Pictures that come whole and cut into tiles, whose features are laid out as in the picture, with ends of lines."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.export import Dim
from transformers.image_processing_utils import select_best_resolution

from ..errors import InputError
from .picture_order import pictures_per_row, repeated, sample_pixels

NEWLINE = -1
"""Place of the feature at the end of a line, which is none of a tile."""

Laid = tuple[torch.Tensor, torch.Tensor]
"""Places among the features of a picture's own tiles, int64, and their weights in the mean, float32; equal shapes."""


@dataclass(frozen=True)
class CroppedImages:
    """Pictures of any size as tiles, ``pixel_values [n, tiles, channels, edge, edge]``, with their sizes in pixels.

    The first tile is the whole picture. The others are the picture, fitted into one of `resolutions` and cut into rows
    and columns; what lies on the padding around it is left out again, and a learned feature ends each line (LLaVA-NeXT,
    arXiv 2407.07895; LLaVA-OneVision, arXiv 2408.03326, section 3.2). Tiles behind those of a picture are read by
    nobody. A row of sizes is height and width, and 0 behind them for a picture that came whole only.

    The program is told where each feature lies among those of all tiles: ``places [T, taps]``, and
    ``weights [T, taps]`` if it is the mean of several.

    Attributes:
        channels: of a tile.
        edge: pixels along the edge of a tile.
        side: features along the edge of a tile.
        resolutions: heights and widths in pixels that pictures are fitted into.
        most: tiles' worth of features that are not averaged to fewer; None if none are.
        takes_videos: whether frames are tiles whose features are averaged to half in each direction, those of a video
            ``pixel_values_videos [n, frames, channels, edge, edge]`` with one end of a line behind them.
    """

    channels: int
    edge: int
    side: int
    resolutions: tuple[tuple[int, int], ...]
    most: int | None = None
    takes_videos: bool = False
    kind: Literal["cropped"] = "cropped"

    @property
    def averages(self) -> bool:
        return self.takes_videos or self.most is not None

    @property
    def shapes(self) -> dict[str, dict[int, Any]]:
        features = Dim("features", min=2)
        return {"pixel_values": {0: Dim.DYNAMIC}, "places": {0: features}, "weights": {0: features}}

    def inputs(self, pixel_values: torch.Tensor, grid: torch.Tensor | None) -> dict[str, torch.Tensor]:
        counts = self._tiles(pixel_values, grid)
        tiles = torch.cat([of_one[:count] for of_one, count in zip(pixel_values, counts, strict=True)])
        laid = self._laid_out(pixel_values, grid)
        first = [sum(counts[:i]) * self.side**2 for i in range(len(counts))]
        newline = len(tiles) * self.side**2
        places = [
            torch.where(places == NEWLINE, newline, places + start)
            for (places, _), start in zip(laid, first, strict=True)
        ]
        given = {"pixel_values": tiles, "places": torch.cat(places).to(tiles.device)}
        if self.averages:
            given["weights"] = torch.cat([weights for _, weights in laid]).to(tiles.device)
        return given

    def apart(
        self, pixel_values: torch.Tensor, grid: torch.Tensor | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        yield pixel_values, grid

    def sample(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of the resolutions with the fewest tiles, the second of them padded."""
        smallest = sorted(self.resolutions, key=math.prod)
        (height, width), (other_height, other_width) = smallest[0], smallest[min(1, len(smallest) - 1)]
        grid = torch.tensor([[height, width], [other_height, max(1, other_width * 2 // 3)]])
        return sample_pixels(2, max(self.tiles_of(grid)), self.channels, self.edge, self.edge), grid

    def check(self, pixel_values: torch.Tensor, grid: torch.Tensor | None) -> None:
        expected = self.channels, self.edge, self.edge
        if pixel_values.ndim != 5 or tuple(pixel_values.shape[2:]) != expected:
            raise InputError(
                f"pixel_values has shape {list(pixel_values.shape)}; expected [pictures, tiles, "
                f"{', '.join(map(str, expected))}]. Pass what the model's processor returns."
            )
        if grid is None and self.takes_videos:
            return
        if grid is None or len(grid) != len(pixel_values) or grid.ndim != 2 or (grid[:, :2] < 1).any():
            raise InputError(
                f"image_sizes are {None if grid is None else grid.tolist()}; expected [{len(pixel_values)}, 2], height "
                f"and width of each picture. Pass what the model's processor returns."
            )
        if (most := max(self.tiles_of(grid))) > pixel_values.shape[1]:
            raise InputError(
                f"pixel_values has {pixel_values.shape[1]} tiles of each picture, but pictures of sizes "
                f"{grid[:, :2].tolist()} have up to {most}. Pass what the model's processor returns."
            )

    def sizes(self, pixel_values: torch.Tensor, grid: torch.Tensor | None) -> list[int]:
        return [len(places) for places, _ in self._laid_out(pixel_values, grid)]

    def repeat(
        self, given: Mapping[str, torch.Tensor], names: Sequence[str], tokens: Sequence[int], times: int
    ) -> dict[str, torch.Tensor]:
        pixels, grid, groups = (given.get(name) for name in (names[0], "image_sizes", "batch_num_images"))
        assert pixels is not None
        if grid is not None:
            grid = mark_whole(grid.cpu(), groups)
        per_row = pictures_per_row(tokens, self.sizes(pixels, grid))
        of_pictures = repeated(per_row, times)
        found = {name: given[name][of_pictures] for name in (names[0], "image_sizes") if name in given}
        if groups is not None:
            found["batch_num_images"] = groups[repeated(pictures_per_row(per_row, groups.tolist()), times)]
        return found

    def tiles_of(self, grid: torch.Tensor) -> list[int]:
        """Tiles of pictures of such sizes."""
        return [1 + math.prod(self._cut(size[:2])) if _is_cut(size) else 1 for size in grid.tolist()]

    def _tiles(self, pixel_values: torch.Tensor, grid: torch.Tensor | None) -> list[int]:
        """Tiles of each picture, or frames of each video."""
        return [pixel_values.shape[1]] * len(pixel_values) if grid is None else self.tiles_of(grid)

    def _cut(self, size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of tiles."""
        height, width = select_best_resolution((size[0], size[1]), list(self.resolutions))
        return height // self.edge, width // self.edge

    def _laid_out(self, pixel_values: torch.Tensor, grid: torch.Tensor | None) -> list[Laid]:
        """Where the features of each picture or video lie, ``[T, taps]``."""
        if grid is None:
            return [self._video(pixel_values.shape[1])] * len(pixel_values)
        return [self._picture(size) for size in grid.tolist()]

    def _picture(self, size: Sequence[int]) -> Laid:
        whole = self._alone(torch.arange(self.side**2))
        if not _is_cut(size):
            return _joined([whole, self._alone(torch.tensor([NEWLINE]))])
        rows, columns = self._cut(size[:2])
        tile = torch.arange(1, 1 + rows * columns).view(rows, 1, columns, 1) * self.side**2
        cells = (tile + torch.arange(self.side**2).view(1, self.side, 1, self.side)).flatten(2).flatten(0, 1)
        lines = self._fitted(_without_padding(cells, size[0], size[1]))
        ends = self._alone(torch.full((len(lines[0]), 1), NEWLINE))
        return _joined([whole, _flat(_joined([lines, ends], dim=1))])

    def _video(self, frames: int) -> Laid:
        half = math.ceil(self.side / 2)
        cells = torch.arange(frames * self.side**2).view(frames, self.side, self.side)
        made = [_flat(averaged(frame, half, half)) for frame in cells]
        return _joined([*made, self._alone(torch.tensor([NEWLINE]))])

    def _fitted(self, cells: torch.Tensor) -> Laid:
        """Those of a picture, averaged to fewer if they are too many, ``[height, width, taps]``."""
        ratio = math.sqrt(cells.numel() / (self.most * self.side**2)) if self.most else 1.0
        if ratio <= _TOLERATED:
            return self._alone(cells)
        return averaged(cells, int(cells.shape[0] // ratio), int(cells.shape[1] // ratio))

    def _alone(self, places: torch.Tensor) -> Laid:
        """Places that are no means of others, and their weights, ``[..., taps]``."""
        taps = 4 if self.averages else 1
        weights = torch.zeros(*places.shape, taps)
        weights[..., 0] = 1
        return places[..., None].expand(*places.shape, taps), weights


_TOLERATED = 1.1
"""How many times too many features along an edge are not averaged yet, in LLaVA-OneVision."""


def mark_whole(sizes: torch.Tensor, groups: torch.Tensor | None) -> torch.Tensor:
    """Sizes ``[n, 2]`` of pictures, and 0 behind those of pictures that came whole: those of groups of several.

    Raises:
        InputError: groups have other pictures in all.
    """
    if groups is None:
        return sizes
    counts = groups.cpu()
    if counts.ndim != 1 or int(counts.sum()) != len(sizes):
        raise InputError(
            f"batch_num_images is {counts.tolist()}, {int(counts.sum())} pictures in all, but image_sizes has "
            f"{len(sizes)}. Pass what the model's processor returns."
        )
    is_cut = (counts == 1).repeat_interleave(counts)
    return torch.cat([sizes, is_cut[:, None].to(sizes.dtype)], dim=1)


def lay_out(
    features: torch.Tensor, newline: torch.Tensor, places: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """Features of pictures, ``[T, d]``, from those of all their tiles.

    Args:
        features: ``[tiles, side * side, d]``.
        newline: that at the end of a line, ``[d]``.
        places: `CroppedImages.inputs` of that name, as `weights`.
        weights: None if no feature is a mean of others.
    """
    rows = torch.cat([features.flatten(0, 1), newline[None].to(features.dtype)])
    found = rows[places]  # [T, taps, d]
    if weights is None:
        return found[:, 0]
    return (found * weights[..., None]).sum(dim=1).to(features.dtype)


def averaged(cells: torch.Tensor, height: int, width: int) -> Laid:
    """Where each of ``[height, width]`` cells lies among others, bilinearly and from edge to edge.

    Args:
        cells: places, ``[H, W]``.
        height: of the result.
        width: of the result.

    Returns:
        The four places around each, and their weights, ``[height, width, 4]``.
    """
    above, below, down = _between(cells.shape[0], height)
    left, right, across = _between(cells.shape[1], width)
    corners = [cells[edge][:, side] for edge in (above, below) for side in (left, right)]
    shares = [v[:, None] * h for v in (1 - down, down) for h in (1 - across, across)]
    return torch.stack(corners, dim=-1), torch.stack(shares, dim=-1)


def _between(size: int, wanted: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The cells on both sides of each of `wanted` ones along an edge, and how far behind the first it lies."""
    middle = ((torch.arange(wanted, dtype=torch.float64) + 0.5) * size / wanted - 0.5).clamp(min=0)
    first = middle.long().clamp(max=size - 1)
    return first, (first + 1).clamp(max=size - 1), (middle - first).float()


def _is_cut(size: Sequence[int]) -> bool:
    return len(size) == 2 or bool(size[2])


def _without_padding(cells: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Those cells that a picture of such a size covers, fitted into the middle of all of them."""
    rows, columns = cells.shape
    if width / height > columns / rows:
        margin = (rows - int(round(height * (columns / width), 7))) // 2
        return cells[margin : rows - margin]
    margin = (columns - int(round(width * (rows / height), 7))) // 2
    return cells[:, margin : columns - margin]


def _joined(parts: Sequence[Laid], dim: int = 0) -> Laid:
    places, weights = zip(*parts, strict=True)
    return torch.cat(places, dim=dim), torch.cat(weights, dim=dim)


def _flat(cells: Laid) -> Laid:
    """``[height * width, taps]``."""
    return cells[0].flatten(0, 1), cells[1].flatten(0, 1)
