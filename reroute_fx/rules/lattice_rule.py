"""Rank by place: tokens spread evenly over each picture, whatever is in it."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..errors import ConfigError
from ..passes import Candidates
from .rule_checks import FORBID, whole_numbers

_LEVELS = 8
"""Lattices in each other: any number of tokens is spread out in pictures of up to 256 x 256 cells of the first one."""


@dataclass(frozen=True)
class LatticeRule:
    """Tokens on a lattice of rows and columns come first.

    On the lattice, and again off it, cells come in the order of ordered dithering (Bayer, 1973): every second row and
    column first, of these every second one first, and so on, so that any number of them is spread out. The same cells
    of several pictures are equal; the earlier picture goes first.

    Attributes:
        stride: rows and columns from one token of the lattice to the next.
        shift: row and column of its first token, each below the stride.

    Raises:
        ConfigError: on construction, naming the field.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID
    layer: ClassVar[None] = None

    stride: int = 3
    shift: tuple[int, int] = (0, 0)
    by: Literal["lattice"] = "lattice"

    def __post_init__(self) -> None:
        if type(self.stride) is not int or self.stride < 1:
            raise ConfigError(
                f"stride of a lattice is {self.stride!r}; expected a whole number of 1 or more."
            )
        shift = whole_numbers("shift", self.shift)
        if len(shift) != 2 or max(shift) >= self.stride:
            raise ConfigError(
                f"shift of a lattice is {shift}; expected a row and a column in 0..{self.stride - 1}, below its stride."
            )
        object.__setattr__(self, "shift", shift)

    def __str__(self) -> str:
        shift = f", shifted by {self.shift[0]} and {self.shift[1]}" if any(self.shift) else ""
        return f"lattice of every {self.stride} rows and columns{shift}"

    def __call__(self, candidates: Candidates) -> torch.Tensor:
        down, across = candidates.rows - self.shift[0], candidates.columns - self.shift[1]
        is_on = (down % self.stride == 0) & (across % self.stride == 0)
        on = _dithered(down // self.stride, across // self.stride)
        return torch.where(is_on, 2 - on, 1 - _dithered(candidates.rows, candidates.columns))


def _dithered(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Threshold of each cell in Bayer's matrix, in [0, 1), exact in float32."""
    threshold = torch.zeros_like(rows)
    for _ in range(_LEVELS):
        odd_row, odd_column = rows % 2, columns % 2
        threshold = 4 * threshold + 2 * ((odd_row + odd_column) % 2) + odd_row
        rows, columns = rows // 2, columns // 2
    scaled: torch.Tensor = threshold.float() / 4**_LEVELS
    return scaled
