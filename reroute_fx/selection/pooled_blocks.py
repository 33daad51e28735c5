"""Inputs of a program that pools: the blocks of each picture, and the tokens that stand for them.

See `PoolBlocks` for what it does with them. A block holds the square of its edge of tokens or a little more; pictures
with fewer tokens have none.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch

from ..capture.cells import Grid
from ..passes.tensor_names import ALWAYS, BLOCKS, MIDDLES

_NONE = torch.iinfo(torch.int64).max
"""Number of no block, and place of no token."""


def pooled_inputs(
    is_visual: torch.Tensor, pictures: Sequence[Sequence[Grid]], edge: int
) -> dict[str, torch.Tensor]:
    """``blocks [B, S]``, ``middles [B, M]`` and ``always [B, N]`` on the host.

    Args:
        is_visual: which places hold a visual token, ``[B, S]`` bool.
        pictures: the grid of each picture of each row; each frame of a video has blocks of its own.
        edge: of a block, in visual tokens.
    """
    found = [_of_row(row, edge) for row in pictures]
    blocks = torch.full(is_visual.shape, _NONE)
    middles = torch.full((len(found), max(1, *(len(tokens) for _, tokens in found))), _NONE)
    always = torch.zeros(len(found), max(1, *(len(numbers) for numbers, _ in found)), dtype=torch.bool)
    for row, (numbers, tokens) in enumerate(found):
        places = is_visual[row].nonzero().flatten()
        blocks[row, places] = numbers
        middles[row, : len(tokens)] = places[tokens]
        always[row, tokens] = True
    return {BLOCKS: blocks, MIDDLES: middles, ALWAYS: always}


def _of_row(pictures: Sequence[Grid], edge: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The block of each visual token of a row, and the token in the middle of each block, both int64."""
    numbers, middles = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
    first_block = first_token = 0
    for frames, rows, columns in pictures:
        of_frame, middles_of_frame = _of_frame(rows, columns, edge)
        for _ in range(frames):
            numbers.append(of_frame.where(of_frame == _NONE, of_frame + first_block))
            middles.append(middles_of_frame + first_token)
            first_block += len(middles_of_frame)
            first_token += rows * columns
    return torch.cat(numbers), torch.cat(middles)


@lru_cache(256)
def _of_frame(rows: int, columns: int, edge: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_of_row`, of one frame."""
    area = edge * edge
    down = max(1, min(round(rows / edge), rows * columns // area))
    across = rows * columns // (area * down)
    if not across:
        return torch.full((rows * columns,), _NONE), torch.zeros(0, dtype=torch.int64)
    numbers = _parts(rows, down)[:, None] * across + _parts(columns, across)
    middles = _middles(rows, down)[:, None] * columns + _middles(columns, across)
    return numbers.flatten(), middles.flatten()


def _parts(size: int, count: int) -> torch.Tensor:
    """In which of `count` parts of nearly equal length each of `size` places is."""
    return torch.arange(size) * count // size


def _middles(size: int, count: int) -> torch.Tensor:
    """The place in the middle of each part; of two the later one."""
    ends = -(-torch.arange(count + 1) * size // count)
    return (ends[:-1] + ends[1:]) // 2
