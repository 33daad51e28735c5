"""`reroute::restore_tokens_`: the same stream as `restore_tokens`, in its own memory."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_examples import stream_by_loops
from suite_tiers import examples
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.library import opcheck

from reroute_fx.kernels import restore_tokens, restore_tokens_, restore_tokens_reference_

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)


def example(length, active, slots, width=6, dtype=torch.float32, seed=0):
    """Of each row `active` names how many of its `slots` rows have a place; the others are not numbers."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.tensor([length, length, length + 1, 2**63 - 1]).repeat(slots)[:slots].sort().values
    positions = positions.repeat(len(active), 1)
    for row, count in enumerate(active):
        positions[row, :count] = torch.randperm(length, generator=generator)[:count].sort().values
    positions = positions.sort(dim=1).values
    stream = torch.randn(len(active), length, width, generator=generator)
    rows = torch.randn(len(active), slots, width, generator=generator)
    if dtype.is_floating_point:
        rows = rows.masked_fill((positions >= length)[:, :, None], math.nan)
    return stream.to(dtype), rows.to(dtype), positions


EXAMPLES = {
    "one row": lambda: example(1, (1,), 1),
    "a row without a token": lambda: example(1, (0,), 2),
    "batch 1": lambda: example(63, (20,), 20),
    "ragged": lambda: example(63, (20, 0, 3), 25),
    "all active": lambda: example(9, (9, 9), 9),
    "more rows than places": lambda: example(9, (9, 4), 15),
    "no token anywhere": lambda: example(9, (0, 0), 3),
}


def assert_writes_in_place(operator, stream, rows, positions):
    expected, copies = restore_tokens(stream, rows, positions), (rows.clone(), positions.clone())
    assert expected.tolist() == stream_by_loops(stream, rows, positions)
    written, memory = stream.clone(), stream.data_ptr()
    assert operator(written, rows, positions) is None
    assert torch.equal(written, expected)
    assert stream.data_ptr() == memory
    assert torch.equal(rows.nan_to_num(0), copies[0].nan_to_num(0))
    assert torch.equal(positions, copies[1])


@pytest.mark.parametrize(
    "operator", [restore_tokens_reference_, restore_tokens_, torch.ops.reroute.restore_tokens_]
)
@pytest.mark.parametrize("inputs", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_equals_restore_tokens(inputs, operator):
    assert_writes_in_place(operator, *inputs())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype):
    assert_writes_in_place(restore_tokens_, *example(63, (20, 0, 3), 25, dtype=dtype))


def test_example_by_hand():
    stream = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]])
    rows = torch.tensor([[[-1.0], [-3.0]], [[-5.0], [math.nan]]])
    restore_tokens_(stream, rows, torch.tensor([[0, 2], [1, 3]]))
    assert stream.tolist() == [[[-1], [2], [-3]], [[4], [-5], [6]]]


def test_what_is_not_written_keeps_even_its_bits():
    stream, rows, positions = example(9, (2, 0), 4)
    positions[0, :2] = torch.tensor([1, 8])
    # An all-ones pattern is a NaN with a payload.
    stream.view(torch.int32).fill_(-1)
    stream[:, 5] = -0.0
    before = stream.clone().view(torch.int32)
    restore_tokens_(stream, rows, positions)
    before[0, [1, 8]] = rows[0, :2].view(torch.int32)
    assert torch.equal(stream.view(torch.int32), before)


def test_rows_and_positions_in_other_layouts():
    stream, rows, positions = example(63, (20, 0, 3), 25)
    rows = rows.transpose(1, 2).contiguous().transpose(1, 2)
    positions = positions.t().contiguous().t()
    assert not rows.is_contiguous()
    assert not positions.is_contiguous()
    assert_writes_in_place(restore_tokens_, stream, rows, positions)


@examples(gate=12, full=50, reason="drawn sizes", derandomize=True)
@given(
    active=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    padding=st.integers(0, 5),
    more_slots=st.integers(0, 5),
    width=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_any_shape_equals_restore_tokens(active, padding, more_slots, width, seed):
    length = max(1, *active) + padding
    inputs = example(length, active, max(1, *active) + more_slots, width, seed=seed)
    assert_writes_in_place(restore_tokens_, *inputs)


@pytest.mark.parametrize("inputs", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_opcheck(inputs):
    opcheck(torch.ops.reroute.restore_tokens_, inputs())


def test_schema_says_that_the_stream_is_written():
    arguments = torch.ops.reroute.restore_tokens_.default._schema.arguments
    assert [a.alias_info is not None and a.alias_info.is_write for a in arguments] == [True, False, False]


def test_fake_of_symbolic_sizes():
    inputs = example(63, (20, 3), 25)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        stream, rows, positions = map(mode.from_tensor, inputs)
        sizes = list(map(str, stream.shape))
        assert restore_tokens_(stream, rows, positions) is None
    assert all(isinstance(size, torch.SymInt) for size in stream.shape)
    assert list(map(str, stream.shape)) == sizes
    assert mode.shape_env.guards == []


def twice(stream, rows, positions):
    """Of a stream that the graph makes, and of one that it is given."""
    made = stream + 1
    restore_tokens_(made, rows, positions)
    restore_tokens_(stream, rows * 2, positions)
    return made


@pytest.mark.full("3 s; compiled regions hold it in test_routed_model.py")
def test_compiled_for_any_size():
    backend = CompileCounterWithBackend("inductor")
    compiled = torch.compile(twice, backend=backend, fullgraph=True, dynamic=True)
    for sizes in [(63, (20, 7, 2), 25), (30, (30, 0), 32)]:
        stream, rows, positions = example(*sizes)
        expected = [restore_tokens(stream + 1, rows, positions), restore_tokens(stream, rows * 2, positions)]
        made = compiled(stream, rows, positions)
        assert torch.equal(made, expected[0])
        assert torch.equal(stream, expected[1])
    assert backend.frame_count == 1


@pytest.mark.full("3 s; compiled regions hold it in test_routed_model.py")
def test_compiled_reference_for_any_size():
    backend = CompileCounterWithBackend("inductor")
    compiled = torch.compile(restore_tokens_reference_, backend=backend, fullgraph=True, dynamic=True)
    for sizes in [(63, (20, 7, 2), 25), (30, (30, 0), 32)]:
        assert_writes_in_place(compiled, *example(*sizes))
    assert backend.frame_count == 1
