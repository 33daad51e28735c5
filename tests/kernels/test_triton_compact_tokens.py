"""`reroute::compact_tokens` as a Triton kernel, interpreted: bit for bit what the reference returns."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_examples import NO_TOKEN, as_integers, positions_of, random_bits
from suite_tiers import examples, one, singles
from torch.library import opcheck

from reroute_fx.kernels import compact_tokens_reference
from reroute_fx.kernels.compact_tokens import triton as kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def assert_matches_reference(tensors, positions, dims):
    copies = [as_integers(x).clone() for x in tensors]
    results = torch.ops.reroute.compact_tokens_triton(tensors, positions, dims)
    expected = compact_tokens_reference(copies, positions, dims)
    for result, reference, x in zip(results, expected, tensors, strict=True):
        assert (result.shape, result.stride()) == (reference.shape, reference.stride())
        assert result.dtype is x.dtype
        assert torch.equal(as_integers(result), reference)
    assert all(map(torch.equal, map(as_integers, tensors), copies))


@singles("interpreted kernels are slow")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 33, 100, 128])
def test_matches_reference(width, dtype):
    positions = positions_of(37, (20, 0, 3), 22)
    assert_matches_reference([random_bits(3, 37, width, dtype=dtype)], positions, [1])


@pytest.mark.parametrize("width", [kernels.BLOCK - 1, kernels.BLOCK, kernels.BLOCK + 1, 3 * kernels.BLOCK])
def test_rows_around_the_size_of_a_block(width):
    stream = random_bits(2, 5, width, dtype=torch.bfloat16)
    assert_matches_reference([stream], positions_of(5, (3, 1), 4), [1])


def stage(batch, length, dtype=torch.bfloat16):
    """More than a stage ever gathers at once: the stream, rotary tables, keys, position ids and masks."""
    tensors = [
        random_bits(batch, length, 100, dtype=dtype),
        random_bits(1, length, 40, seed=1),
        random_bits(1, length, 40, seed=2),
        random_bits(batch, length, 66, dtype=dtype, seed=3),
        random_bits(3, batch, length, 33, dtype=dtype, seed=4),
        random_bits(3, 1, length, dtype=torch.int64, seed=5),
        random_bits(batch, length, dtype=torch.int64, seed=6),
        random_bits(batch, length, dtype=torch.bool, seed=7),
        random_bits(2, 3, batch, length, 2, 5, dtype=dtype, seed=8),
    ]
    return tensors, [1, 1, 1, 1, 2, 2, 1, 1, 3]


@one("interpreted kernels are slow")
@pytest.mark.parametrize("count", range(10))
def test_any_number_of_tensors(count):
    tensors, dims = stage(2, 21)
    assert_matches_reference(tensors[:count], positions_of(21, (5, 3), 6), dims[:count])


@one("interpreted kernels are slow")
@pytest.mark.parametrize("block", [8, 32, 64])
def test_rows_of_several_blocks(block, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", block)
    tensors, dims = stage(2, 9)
    assert_matches_reference(tensors, positions_of(9, (3, 1), 4), dims)


@one("interpreted kernels are slow")
@pytest.mark.parametrize(
    ("length", "active", "slots"),
    [(1, (1,), 1), (1, (0, 1), 2), (9, (9, 9), 9), (9, (0, 0), 3), (9, (9, 2), 15), (63, (1,), 1)],
)
def test_few_and_many_rows(length, active, slots):
    tensors, dims = stage(len(active), length, torch.float16)
    assert_matches_reference(tensors, positions_of(length, active, slots), dims)


def test_where_there_is_no_row_is_exact_zero():
    streams = [torch.full((1, 4, 3), torch.nan), torch.full((1, 4, 3), -1), torch.full((1, 4, 3), True)]
    positions = torch.tensor([[4, 5, NO_TOKEN]])
    results = torch.ops.reroute.compact_tokens_triton(streams, positions, [1, 1, 1])
    assert all(result.shape == (1, 3, 3) for result in results)
    assert not any(result.view(torch.uint8).any() for result in results)


def test_positions_may_repeat_and_stand_in_any_order():
    positions = torch.tensor([[8, 0, 9, 0, 8, 3], [NO_TOKEN, 2, 2, 1, 9, 0]])
    assert_matches_reference([random_bits(2, 9, 33)], positions, [1])


def test_strided_inputs():
    stream = random_bits(21, 2, 33).transpose(0, 1)
    rotary = random_bits(3, 2, 40, 21).transpose(2, 3)
    expanded = random_bits(1, 21, 40).expand(2, -1, -1)
    sliced = random_bits(2, 50, 40)[:, 7:28]
    positions = positions_of(21, (16, 8), 20)[:, ::2]
    tensors = [stream, rotary, expanded, sliced]
    assert not any(x.is_contiguous() for x in (*tensors, positions))
    assert_matches_reference(tensors, positions, [1, 2, 1, 1])


def test_one_tensor_twice():
    stream = random_bits(2, 21, 33)
    assert_matches_reference([stream, stream], positions_of(21, (9, 4), 9), [1, 1])


@examples(gate=4, full=12, reason="drawn sizes", derandomize=True)
@given(
    batch=st.integers(1, 2),
    length=st.integers(1, 12),
    tensors=st.lists(
        st.tuples(
            st.lists(st.integers(1, 2), max_size=2),
            st.lists(st.integers(1, 12), max_size=2),
            st.booleans(),
            st.sampled_from(DTYPES),
        ),
        min_size=1,
        max_size=6,
    ),
    block=st.sampled_from([16, 4096]),
    data=st.data(),
)
def test_any_shape_matches_reference(batch, length, tensors, block, data):
    inputs = [
        random_bits(*lead, 1 if shared else batch, length, *tail, dtype=dtype)
        for lead, tail, shared, dtype in tensors
    ]
    slots = data.draw(st.integers(1, 4))
    row = st.lists(st.integers(0, length + 1) | st.just(NO_TOKEN), min_size=slots, max_size=slots)
    positions = torch.tensor(data.draw(st.lists(row, min_size=batch, max_size=batch)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "BLOCK", block)
        assert_matches_reference(inputs, positions, [len(lead) + 1 for lead, *_ in tensors])


def test_schema():
    tensors, dims = stage(2, 21)
    inputs = tensors[:5], positions_of(21, (9, 4), 11), dims[:5]
    opcheck(torch.ops.reroute.compact_tokens_triton, inputs, test_utils="test_schema")
