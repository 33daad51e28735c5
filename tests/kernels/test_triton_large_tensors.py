"""Triton kernels, interpreted, where offsets don't fit into 32 bits. Memory that nothing touches takes no space."""

import pytest
import torch

from reroute_fx.kernels import compact_tokens_reference, visual_scores_reference
from reroute_fx.kernels.compact_tokens.triton import compact_tokens_triton
from reroute_fx.kernels.restore_tokens.triton import restore_tokens_triton_
from reroute_fx.kernels.visual_scores.triton import visual_scores_triton

WIDTH = 2**16
PLACES = 2**14 + 3


@pytest.fixture(autouse=True)
def _untouched_memory(interpreter, monkeypatch):
    """The interpreter copies every tensor back to where it came from, on CPU onto itself."""
    copy = torch.UntypedStorage.copy_

    def copy_elsewhere(self, source, *args, **kwargs):
        return self if self.data_ptr() == source.data_ptr() else copy(self, source, *args, **kwargs)

    monkeypatch.setattr(torch.UntypedStorage, "copy_", copy_elsewhere)


def untouched(*shape, dtype):
    try:
        tensor = torch.empty(shape, dtype=dtype)
    except RuntimeError:
        pytest.skip("so much memory isn't granted, even untouched")
    assert tensor.numel() > 2**31
    return tensor


def random_bytes(*shape):
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8)


def test_compacting_a_large_stream():
    stream, rows = untouched(2, PLACES, WIDTH, dtype=torch.int8), random_bytes(2, 2, WIDTH)
    positions = torch.tensor([[0, PLACES - 1], [1, PLACES - 1]])
    stream[torch.arange(2)[:, None], positions] = rows
    (result,) = compact_tokens_triton([stream], positions, [1])
    assert torch.equal(result, rows)


def test_compacting_several_planes():
    tables = untouched(3, 1, PLACES, WIDTH, dtype=torch.int8)
    positions = torch.tensor([[3, PLACES - 1], [PLACES - 1, 3]])
    tables[:, 0, positions[0]] = random_bytes(3, 2, WIDTH)
    (result,) = compact_tokens_triton([tables], positions, [2])
    (expected,) = compact_tokens_reference([tables], positions, [2])
    assert torch.equal(result, expected)


@pytest.mark.parametrize("row", [0, 1])
def test_restoring_into_a_large_stream(row):
    stream, rows = untouched(2, PLACES, WIDTH, dtype=torch.int8), random_bytes(2, 1, WIDTH)
    positions = torch.full((2, 1), PLACES)
    positions[row] = PLACES - 1
    stream[:, -2:] = 0
    restore_tokens_triton_(stream, rows, positions)
    assert torch.equal(stream[row, -1], rows[row, 0])
    assert not stream[row, -2].any()
    assert not stream[1 - row, -2:].any()


def test_keys_far_apart():
    """As in a cache whose places lie far from each other."""
    memory, step = untouched(70 * 2**25, dtype=torch.float16), 2**25
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 2, 70, 8, generator=generator).half()
    keys = memory.as_strided((1, 2, 70, 8), (0, 8, step, 1)).copy_(values)
    query = torch.randn(1, 4, 1, 8, generator=generator).half()
    rest = torch.arange(5, 70)[None], torch.tensor([70]), 0.5
    scores = visual_scores_triton(query, keys, *rest)
    assert torch.equal(scores, visual_scores_triton(query, values, *rest))
    torch.testing.assert_close(scores, visual_scores_reference(query, values, *rest))
