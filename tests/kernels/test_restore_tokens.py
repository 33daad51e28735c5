"""`reroute::restore_tokens`: against loops over rows, with its schema, fake implementation and properties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from reroute_fx.kernels import compact_tokens, restore_tokens, restore_tokens_reference, select_tokens

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def example(batch, length, active, width=6, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    stream = torch.randn(batch, length, width, generator=generator).to(dtype)
    rows = torch.randn(batch, active, width, generator=generator).to(dtype)
    positions = [torch.randperm(length, generator=generator)[:active].sort().values for _ in range(batch)]
    return stream, rows, torch.stack(positions)


def stream_by_loops(stream, rows, positions):
    """The result as nested lists; every 16- and 32-bit value is exact in Python's float64."""
    result = stream.double().tolist()
    for sample, (new, places) in enumerate(zip(rows.double().tolist(), positions.tolist(), strict=True)):
        for row, place in zip(new, places, strict=True):
            result[sample][place] = row
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "length", "active"), [(1, 63, 20), (3, 63, 20), (3, 500, 1), (2, 63, 63), (1, 1, 1)]
)
def test_matches_loops(batch, length, active, dtype):
    inputs = example(batch, length, active, dtype=dtype)
    result = restore_tokens_reference(*inputs)
    assert result.dtype is dtype
    assert result.tolist() == stream_by_loops(*inputs)


def test_operator_runs_the_reference():
    inputs = example(3, 63, 20)
    for operator in (restore_tokens, torch.ops.reroute.restore_tokens):
        assert torch.equal(operator(*inputs), restore_tokens_reference(*inputs))


def test_example_by_hand():
    stream = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]])
    rows = torch.tensor([[[-1.0], [-3.0]], [[-5.0], [-6.0]]])
    result = restore_tokens(stream, rows, torch.tensor([[0, 2], [1, 2]]))
    assert result.tolist() == [[[-1], [2], [-3]], [[4], [-5], [-6]]]


def non_contiguous():
    stream, rows, positions = example(3, 63, 20, seed=1)
    stream = stream.transpose(0, 1).contiguous().transpose(0, 1)
    rows = rows.transpose(1, 2).contiguous().transpose(1, 2)
    positions = positions.t().contiguous().t()
    assert not any(x.is_contiguous() for x in (stream, rows, positions))
    return stream, rows, positions


def expanded():
    stream, rows, positions = example(1, 63, 20, seed=2)
    return stream.expand(3, -1, -1), rows.expand(3, -1, -1), positions.expand(3, -1)


OPCHECK_INPUTS = {
    "batch 1": lambda: example(1, 63, 20),
    "batch 3": lambda: example(3, 63, 20),
    "one active": lambda: example(3, 500, 1),
    "all active": lambda: example(2, 63, 63),
    "one row": lambda: example(1, 1, 1),
    "bfloat16": lambda: example(2, 63, 20, dtype=torch.bfloat16),
    "float16": lambda: example(2, 63, 20, dtype=torch.float16),
    "non-contiguous": non_contiguous,
    "expanded": expanded,
}


@pytest.mark.parametrize("inputs", OPCHECK_INPUTS.values(), ids=OPCHECK_INPUTS.keys())
def test_opcheck(inputs):
    opcheck(torch.ops.reroute.restore_tokens, inputs())


@pytest.mark.parametrize("inputs", OPCHECK_INPUTS.values(), ids=OPCHECK_INPUTS.keys())
def test_fake_has_the_form_of_the_real_output(inputs):
    inputs = inputs()
    real = restore_tokens(*inputs)
    with FakeTensorMode() as mode:
        fake = restore_tokens(*map(mode.from_tensor, inputs))
    assert real.is_contiguous()
    assert fake.is_contiguous()
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
    assert (real.shape, real.dtype) == (inputs[0].shape, inputs[0].dtype)


@pytest.mark.parametrize("inputs", [non_contiguous, expanded])
def test_strided_inputs_match_loops(inputs):
    inputs = inputs()
    assert restore_tokens(*inputs).tolist() == stream_by_loops(*inputs)


def test_inputs_stay_as_they_were():
    inputs = example(3, 63, 20)
    copies = [x.clone() for x in inputs]
    result = restore_tokens(*inputs)
    result.zero_()
    assert all(map(torch.equal, inputs, copies))


def test_deferred_rows_keep_even_their_bit_patterns():
    stream, rows, _ = example(1, 4, 2)
    stream[0, 1] = float("nan")
    stream[0, 3] = -0.0
    result = restore_tokens(stream, rows, torch.tensor([[0, 2]]))
    assert torch.equal(result.view(torch.int32)[:, [1, 3]], stream.view(torch.int32)[:, [1, 3]])
    assert torch.equal(result[:, [0, 2]], rows)


shapes = st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**32))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(shape=shapes, data=st.data())
def test_restoring_compacted_rows_gives_the_stream(shape, data):
    batch, length, width, seed = shape
    active = data.draw(st.integers(1, length))
    stream, _, positions = example(batch, length, active, width, seed=seed)
    (rows,) = compact_tokens([stream], positions, [1])
    assert torch.equal(restore_tokens(stream, rows, positions), stream)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(shape=shapes, data=st.data())
def test_compacting_restored_rows_gives_the_rows(shape, data):
    batch, length, width, seed = shape
    active = data.draw(st.integers(1, length))
    stream, rows, positions = example(batch, length, active, width, seed=seed)
    (again,) = compact_tokens([restore_tokens(stream, rows, positions)], positions, [1])
    assert torch.equal(again, rows)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(shape=shapes, text=st.integers(0, 8), data=st.data())
def test_a_stage_changes_active_rows_only(shape, text, data):
    batch, tokens, width, seed = shape
    keep, length = data.draw(st.integers(1, tokens)), tokens + text
    stream, _, visual_index = example(batch, length, tokens, width, seed=seed)
    scores = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed))
    positions, _ = select_tokens(scores, visual_index, keep, length)
    (rows,) = compact_tokens([stream], positions, [1])
    result = restore_tokens(stream, rows + 1, positions)
    active = torch.zeros(batch, length, dtype=torch.bool).scatter(1, positions, True)
    assert active.sum(dim=1).tolist() == [text + keep] * batch
    assert torch.equal(result[~active], stream[~active])
    assert torch.equal(result[active], stream[active] + 1)
