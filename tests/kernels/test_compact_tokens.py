"""`reroute::compact_tokens`: against loops over rows, with its schema, fake implementation and properties."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from reroute_fx.kernels import compact_tokens, compact_tokens_reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool)


def ascending_positions(batch, length, active, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(length, generator=generator)[:active].sort().values for _ in range(batch)]
    return torch.stack(rows)


def distinct_values(*shape, dtype=torch.float32):
    """Values that differ from row to row; 16-bit dtypes repeat some after 2048."""
    count = torch.Size(shape).numel()
    return (torch.arange(count) % 2039 - 1000).reshape(shape).to(dtype)


def decoder_inputs(batch, length, dtype=torch.float32):
    """What a stage gathers: the stream, rotary tables of 3 and 4 dimensions, and position ids."""
    tensors = [
        distinct_values(batch, length, 6, dtype=dtype),
        distinct_values(1, length, 4, dtype=dtype),
        distinct_values(3, batch, length, 4, dtype=dtype),
        distinct_values(3, 1, length, dtype=torch.int64),
        distinct_values(batch, length, dtype=torch.int64),
    ]
    return tensors, [1, 1, 2, 2, 1]


def rows_by_loops(x, positions, dim):
    batch, active = positions.shape
    rows = torch.empty(*x.shape[: dim - 1], batch, active, *x.shape[dim + 1 :], dtype=x.dtype)
    for lead in product(*map(range, x.shape[: dim - 1])):
        for sample in range(batch):
            source = x[lead][0 if x.shape[dim - 1] == 1 else sample]
            for row, position in enumerate(positions[sample].tolist()):
                rows[lead][sample][row] = source[position]
    return rows


def assert_matches_loops(results, tensors, positions, dims):
    for result, x, dim in zip(results, tensors, dims, strict=True):
        expected = rows_by_loops(x, positions, dim)
        assert result.dtype is x.dtype
        assert result.is_contiguous()
        assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "length", "active"), [(1, 63, 20), (3, 63, 20), (3, 500, 1), (2, 63, 63), (1, 1, 1)]
)
def test_matches_loops(batch, length, active, dtype):
    tensors, dims = decoder_inputs(batch, length, dtype)
    positions = ascending_positions(batch, length, active)
    results = compact_tokens_reference(tensors, positions, dims)
    assert_matches_loops(results, tensors, positions, dims)


def test_operator_runs_the_reference():
    tensors, dims = decoder_inputs(3, 63)
    positions = ascending_positions(3, 63, 20)
    expected = compact_tokens_reference(tensors, positions, dims)
    for operator in (compact_tokens, torch.ops.reroute.compact_tokens):
        assert all(map(torch.equal, operator(tensors, positions, dims), expected))


def test_example_by_hand():
    stream = torch.tensor([[[1, 2], [3, 4], [5, 6]], [[7, 8], [9, 10], [11, 12]]])
    (rows,) = compact_tokens([stream], torch.tensor([[0, 2], [1, 2]]), [1])
    assert rows.tolist() == [[[1, 2], [5, 6]], [[9, 10], [11, 12]]]


def test_one_tensor_serves_all_batches_but_each_has_its_positions():
    positions = torch.tensor([[0, 1], [1, 3], [2, 3]])
    (rows,) = compact_tokens([torch.arange(10, 14)[None]], positions, [1])
    assert rows.tolist() == [[10, 11], [11, 13], [12, 13]]


def test_no_tensors_give_no_rows():
    assert compact_tokens([], ascending_positions(1, 63, 20), []) == []


def plain(batch, length, active, dtype=torch.float32):
    tensors, dims = decoder_inputs(batch, length, dtype)
    return tensors, ascending_positions(batch, length, active), dims


def non_contiguous():
    stream = distinct_values(63, 3, 6).transpose(0, 1)
    rotary = distinct_values(3, 3, 4, 63).transpose(2, 3)
    expanded = distinct_values(1, 63, 4).expand(3, -1, -1)
    positions = ascending_positions(3, 63, 40)[:, ::2]
    assert not any(x.is_contiguous() for x in (stream, rotary, expanded, positions))
    return [stream, rotary, expanded], positions, [1, 2, 1]


def transposed_positions():
    tensors, positions, dims = plain(3, 63, 20)
    return tensors, positions.t().contiguous().t(), dims


def same_tensor_twice():
    stream = distinct_values(2, 63, 6)
    return [stream, stream], ascending_positions(2, 63, 20), [1, 1]


OPCHECK_INPUTS = {
    "batch 1": lambda: plain(1, 63, 20),
    "batch 3": lambda: plain(3, 63, 20),
    "one active": lambda: plain(3, 500, 1),
    "all active": lambda: plain(2, 63, 63),
    "one row": lambda: plain(1, 1, 1),
    "bfloat16": lambda: plain(2, 63, 20, torch.bfloat16),
    "float16": lambda: plain(2, 63, 20, torch.float16),
    "non-contiguous": non_contiguous,
    "transposed positions": transposed_positions,
    "same tensor twice": same_tensor_twice,
}


@pytest.mark.parametrize("inputs", OPCHECK_INPUTS.values(), ids=OPCHECK_INPUTS.keys())
def test_opcheck(inputs):
    opcheck(torch.ops.reroute.compact_tokens, inputs())


@pytest.mark.parametrize("inputs", OPCHECK_INPUTS.values(), ids=OPCHECK_INPUTS.keys())
def test_fake_has_the_form_of_the_real_output(inputs):
    tensors, positions, dims = inputs()
    real = compact_tokens(tensors, positions, dims)
    with FakeTensorMode() as mode:
        fake = compact_tokens([mode.from_tensor(x) for x in tensors], mode.from_tensor(positions), dims)
    assert all(x.is_contiguous() for x in (*real, *fake))
    assert [(x.shape, x.dtype) for x in fake] == [(x.shape, x.dtype) for x in real]


@pytest.mark.parametrize("inputs", [non_contiguous, transposed_positions, same_tensor_twice])
def test_strided_inputs_match_loops(inputs):
    tensors, positions, dims = inputs()
    assert_matches_loops(compact_tokens(tensors, positions, dims), tensors, positions, dims)


def test_rows_are_copies_even_when_all_are_active():
    stream = distinct_values(2, 63, 6)
    (rows,) = compact_tokens([stream], torch.arange(63).expand(2, 63), [1])
    assert torch.equal(rows, stream)
    rows.zero_()
    assert torch.equal(stream, distinct_values(2, 63, 6))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 30),
    lead=st.lists(st.integers(1, 3), max_size=2),
    tail=st.lists(st.integers(1, 4), max_size=2),
    shared=st.booleans(),
    data=st.data(),
)
def test_any_shape_matches_loops(batch, length, lead, tail, shared, data):
    x = distinct_values(*lead, 1 if shared else batch, length, *tail)
    active = data.draw(st.integers(1, length))
    row = st.lists(st.integers(0, length - 1), min_size=active, max_size=active)
    positions = torch.tensor(data.draw(st.lists(row, min_size=batch, max_size=batch)))
    dims = [len(lead) + 1]
    assert_matches_loops(compact_tokens([x], positions, dims), [x], positions, dims)
