"""Which pictures belong to which row of a prompt, and their order when rows are repeated."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch


def sample_pixels(*shape: int) -> torch.Tensor:
    """Different values from -1 to 1, float32."""
    return torch.linspace(-1, 1, math.prod(shape)).reshape(shape)


def pictures_per_row(tokens: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Pictures of each row, from the placeholders of the rows and the features of the pictures."""
    ends = list(accumulate(sizes))
    upto = [bisect_right(ends, end) for end in accumulate(tokens)]
    return [after - before for before, after in pairwise([0, *upto])]


def repeated(counts: Sequence[int], times: int) -> list[int]:
    """Pictures in order, those of each row `times` times."""
    ends = list(accumulate(counts))
    return [
        i
        for end, count in zip(ends, counts, strict=True)
        for _ in range(times)
        for i in range(end - count, end)
    ]
