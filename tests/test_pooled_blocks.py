"""Blocks of pictures: every token is in one, each has a middle, and never are there more than the budget has."""

import math

import pytest
import torch

from reroute_fx.selection.pooled_blocks import pooled_inputs

NONE = torch.iinfo(torch.int64).max


def blocks_of(edge, *pictures):
    """Tokens of each block of a row that is nothing but pictures, and the middles."""
    tokens = sum(math.prod(grid) for grid in pictures)
    found = pooled_inputs(torch.ones(1, tokens, dtype=torch.bool), [pictures], edge)
    middles = [place for place in found["middles"][0].tolist() if place != NONE]
    assert found["always"][0].nonzero().flatten().tolist() == middles
    numbers = found["blocks"][0].tolist()
    assert set(numbers) <= {*range(len(middles)), NONE}
    return [
        [i for i, number in enumerate(numbers) if number == block] for block in range(len(middles))
    ], middles


def test_squares():
    members, middles = blocks_of(3, (1, 6, 6))
    assert members[0] == [0, 1, 2, 6, 7, 8, 12, 13, 14]
    assert members[3] == [21, 22, 23, 27, 28, 29, 33, 34, 35]
    assert middles == [7, 10, 25, 28]


@pytest.mark.parametrize("edge", [2, 3, 6])
def test_blocks_of_any_grid(edge):
    for rows in range(1, 16):
        for columns in range(1, 16):
            members, middles = blocks_of(edge, (1, rows, columns))
            tokens = rows * columns
            assert len(members) <= tokens // edge**2
            assert bool(members) == (tokens >= edge**2)
            assert sorted(token for block in members for token in block) == list(
                range(tokens if members else 0)
            )
            for block, middle in zip(members, middles, strict=True):
                assert middle in block
                down, across = ({place // columns for place in block}, {place % columns for place in block})
                assert len(block) == len(down) * len(across), "it is no rectangle"
                assert [max(side) - min(side) + 1 for side in (down, across)] == [len(down), len(across)]
                assert abs(middle // columns - (min(down) + max(down)) / 2) <= 0.5
                assert abs(middle % columns - (min(across) + max(across)) / 2) <= 0.5


def test_frames_and_pictures_follow_each_other():
    members, middles = blocks_of(2, (2, 2, 4), (1, 1, 1), (1, 2, 2))
    assert members == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15], [17, 18, 19, 20]]
    assert middles == [5, 7, 13, 15, 20]


def test_rows_of_a_batch():
    is_visual = torch.tensor([[0, 1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]]).bool()
    found = pooled_inputs(is_visual, [[(1, 2, 2)], [], [(1, 1, 1)]], 2)
    assert found["blocks"].tolist() == [[NONE, 0, 0, NONE, 0, 0, NONE], [NONE] * 7, [NONE] * 7]
    assert found["middles"].tolist() == [[5], [NONE], [NONE]]
    assert found["always"].tolist() == [[False, False, False, True], [False] * 4, [False] * 4]
