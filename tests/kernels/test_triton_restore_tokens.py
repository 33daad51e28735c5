"""`reroute::restore_tokens` and `restore_tokens_` as a Triton kernel, interpreted: bit for bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_examples import NO_TOKEN, as_integers, positions_of, random_bits
from suite_tiers import examples, singles
from torch.library import opcheck

from reroute_fx.kernels import restore_tokens_reference
from reroute_fx.kernels.restore_tokens import triton as kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def example(length, active, slots, width=33, dtype=torch.float32, seed=0):
    """Of each row `active` names how many of its `slots` rows have a place in the stream."""
    stream = random_bits(len(active), length, width, dtype=dtype, seed=seed)
    rows = random_bits(len(active), slots, width, dtype=dtype, seed=seed + 1)
    return stream, rows, positions_of(length, active, slots, seed)


def assert_matches_reference(stream, rows, positions):
    copies = [as_integers(x).clone() for x in (stream, rows)]
    expected = restore_tokens_reference(*copies, positions)
    result = torch.ops.reroute.restore_tokens_triton(stream, rows, positions)
    assert result.is_contiguous()
    assert result.dtype is stream.dtype
    assert torch.equal(as_integers(result), expected)
    assert all(map(torch.equal, map(as_integers, (stream, rows)), copies))

    written = stream.clone(memory_format=torch.contiguous_format)
    assert torch.ops.reroute.restore_tokens_triton_(written, rows, positions) is None
    assert torch.equal(as_integers(written), expected)


@singles("interpreted kernels are slow")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 33, 100, 128])
def test_matches_reference(width, dtype):
    assert_matches_reference(*example(37, (20, 0, 3), 22, width, dtype))


@pytest.mark.parametrize("width", [kernels.BLOCK - 1, kernels.BLOCK, kernels.BLOCK + 1, 3 * kernels.BLOCK])
def test_rows_around_the_size_of_a_block(width):
    assert_matches_reference(*example(5, (3, 1), 4, width, torch.bfloat16))


@pytest.mark.parametrize("block", [1, 8, 32])
def test_rows_of_several_blocks(block, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", block)
    assert_matches_reference(*example(9, (5, 2), 6))


@pytest.mark.parametrize(
    ("length", "active", "slots"),
    [(1, (1,), 1), (1, (0, 1), 2), (9, (9, 9), 9), (9, (0, 0), 3), (9, (9, 2), 15), (63, (1,), 1)],
)
def test_few_and_many_rows(length, active, slots):
    assert_matches_reference(*example(length, active, slots))


def test_rows_without_a_place_may_stand_anywhere():
    stream, rows, _ = example(9, (0, 0), 6)
    positions = torch.tensor([[9, 0, NO_TOKEN, 3, 10, 8], [2, 9, 9, 1, 9, 0]])
    assert_matches_reference(stream, rows, positions)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_writes_nothing_but_its_rows(dtype):
    _, rows, positions = example(37, (20, 0, 3), 22, dtype=dtype)
    memory = torch.empty(1 + 3 * 37 + 1, 33, dtype=dtype)
    as_integers(memory).fill_(-1)
    assert memory.isnan().all()
    expected = as_integers(memory).clone()
    for sample, places in enumerate(positions.tolist()):
        for row, place in enumerate(places):
            if place < 37:
                expected[1 + sample * 37 + place] = as_integers(rows)[sample, row]
    torch.ops.reroute.restore_tokens_triton_(memory[1:-1].view(3, 37, 33), rows, positions)
    assert torch.equal(as_integers(memory), expected)


def test_strided_inputs():
    stream, rows, positions = example(21, (16, 8), 20)
    stream = stream.transpose(0, 1).contiguous().transpose(0, 1)
    rows = rows.transpose(1, 2).contiguous().transpose(1, 2)
    positions = positions.repeat_interleave(2, dim=1)[:, ::2]
    assert not any(x.is_contiguous() for x in (stream, rows, positions))
    assert_matches_reference(stream, rows, positions)


def test_expanded_inputs():
    stream, rows, positions = example(21, (16,), 20)
    assert_matches_reference(stream.expand(3, -1, -1), rows.expand(3, -1, -1), positions.expand(3, -1))


def test_rows_of_a_longer_tensor():
    stream, rows, positions = example(21, (16, 8), 20, dtype=torch.bfloat16)
    longer = torch.cat([rows, rows], dim=1)
    assert_matches_reference(stream, longer[:, :20], positions)
    assert_matches_reference(stream, longer[:, 20:], positions)


@examples(gate=6, full=25, reason="drawn sizes", derandomize=True)
@given(
    active=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    padding=st.integers(0, 3),
    more_slots=st.integers(0, 3),
    width=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    block=st.sampled_from([4, 4096]),
    seed=st.integers(0, 2**32),
)
def test_any_shape_matches_reference(active, padding, more_slots, width, dtype, block, seed):
    length = max(1, *active) + padding
    inputs = example(length, active, max(1, *active) + more_slots, width, dtype, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "BLOCK", block)
        assert_matches_reference(*inputs)


@pytest.mark.parametrize("name", ["restore_tokens_triton", "restore_tokens_triton_"])
def test_schema(name):
    opcheck(getattr(torch.ops.reroute, name), example(21, (9, 0), 11), test_utils="test_schema")
