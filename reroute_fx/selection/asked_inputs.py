"""Inputs of a routed program that are there only if a ranking rule asks for them; see `Candidates`."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch.export import ExportedProgram

from ..capture.cells import Grid
from ..passes.tensor_names import CELLS, TEXT_INDEX


def asked_inputs(program: ExportedProgram) -> tuple[str, ...]:
    """Names of those that a routed program takes."""
    return tuple(name for name in program.graph_signature.user_inputs if name in (TEXT_INDEX, *CELLS))


def text_index(is_visual: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Places of the text behind each row's last picture, ``[B, T]`` int64; S where a row has no more.

    A row without pictures has its last token only.

    Args:
        is_visual: which places hold a visual token, ``[B, S]`` bool; every row ends with text.
        lengths: tokens of each row.
    """
    batch, places = is_visual.shape
    ends = torch.tensor(lengths)[:, None]
    behind = (
        (torch.arange(places) + 1).expand(batch, places).masked_fill(~is_visual, 0).amax(dim=1, keepdim=True)
    )
    first = torch.where(behind > 0, behind, ends - 1)
    index = first + torch.arange(int((ends - first).max()))
    return index.masked_fill(index >= ends, places)


def cells(rows: Sequence[Sequence[Grid]]) -> dict[str, torch.Tensor]:
    """``rows``, ``columns`` and ``images`` ``[B, N]`` int64 of the visual tokens; 0 where a row has no more.

    Each frame of a video is an image.

    Args:
        rows: the grid of each picture of each row.
    """
    found = [_cells_of_row(grids) for grids in rows]
    padded = torch.nn.utils.rnn.pad_sequence(found, batch_first=True)  # [B, N, 3]
    images, down, across = padded.unbind(dim=2)
    return dict(zip(CELLS, (down.contiguous(), across.contiguous(), images.contiguous()), strict=True))


def _cells_of_row(grids: Sequence[Grid]) -> torch.Tensor:
    """Image, row and column of each visual token of a row, ``[n, 3]``; a token at least."""
    firsts = [0]
    for frames, _, _ in grids:
        firsts.append(firsts[-1] + frames)
    parts = [
        torch.cartesian_prod(torch.arange(first, behind), torch.arange(height), torch.arange(width))
        for (first, behind), (_, height, width) in zip(pairwise(firsts), grids, strict=True)
    ]
    return torch.cat(parts) if parts else torch.zeros(1, 3, dtype=torch.int64)
