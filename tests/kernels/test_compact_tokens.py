"""`reroute::compact_tokens`: against loops over rows, with its schema, fake implementation and properties."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from suite_tiers import examples, one
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.library import opcheck

from reroute_fx.kernels import compact_tokens, compact_tokens_reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool)


def ascending_positions(batch, length, active, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(length, generator=generator)[:active].sort().values for _ in range(batch)]
    return torch.stack(rows)


def padded_positions(length, active, slots, seed=0):
    """`active` names how many of the `slots` places of each row hold a row of the stream."""
    positions = torch.full((len(active), slots), length)
    for row, count in enumerate(active):
        positions[row, :count] = ascending_positions(1, length, count, seed + row)
    return positions


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
    rows = torch.zeros(*x.shape[: dim - 1], batch, active, *x.shape[dim + 1 :], dtype=x.dtype)
    for lead in product(*map(range, x.shape[: dim - 1])):
        for sample in range(batch):
            source = x[lead][0 if x.shape[dim - 1] == 1 else sample]
            for row, position in enumerate(positions[sample].tolist()):
                if position < len(source):
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("length", "active", "slots"),
    [(63, (20, 7, 1), 20), (63, (20,), 30), (63, (63, 0, 5), 63), (9, (9, 4), 15), (1, (1, 0), 2)],
)
def test_padded_positions_match_loops(length, active, slots, dtype):
    tensors, dims = decoder_inputs(len(active), length, dtype)
    positions = padded_positions(length, active, slots)
    results = compact_tokens_reference(tensors, positions, dims)
    assert_matches_loops(results, tensors, positions, dims)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_there_is_no_row_is_exact_zero(dtype):
    worst = -1 if dtype in (torch.int64, torch.bool) else float("nan")
    tensors = [torch.full(shape, worst, dtype=dtype) for shape in [(2, 4, 3), (3, 1, 4, 3), (1, 4)]]
    positions = torch.tensor([[4, 5, 2**63 - 1], [4, 4, 4]])
    results = compact_tokens(tensors, positions, [1, 2, 1])
    assert [x.shape for x in results] == [(2, 3, 3), (3, 2, 3, 3), (2, 3)]
    assert all(not x.contiguous().view(torch.uint8).any() for x in results)


def test_operator_runs_the_reference():
    tensors, dims = decoder_inputs(3, 63)
    positions = padded_positions(63, (20, 7, 1), 25)
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


def test_padded_example_by_hand():
    stream, rotary = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[[7, 8, 9]], [[10, 11, 12]]])
    rows, tables = compact_tokens([stream, rotary], torch.tensor([[0, 2, 3], [1, 3, 3]]), [1, 2])
    assert rows.tolist() == [[1, 3, 0], [5, 0, 0]]
    assert tables.tolist() == [[[7, 9, 0], [8, 0, 0]], [[10, 12, 0], [11, 0, 0]]]


def plain(batch, length, active, dtype=torch.float32):
    tensors, dims = decoder_inputs(batch, length, dtype)
    return tensors, ascending_positions(batch, length, active), dims


def padded(length, active, slots, dtype=torch.float32):
    tensors, dims = decoder_inputs(len(active), length, dtype)
    return tensors, padded_positions(length, active, slots), dims


def non_contiguous():
    stream = distinct_values(63, 3, 6).transpose(0, 1)
    rotary = distinct_values(3, 3, 4, 63).transpose(2, 3)
    expanded = distinct_values(1, 63, 4).expand(3, -1, -1)
    positions = padded_positions(63, (40, 30, 2), 50)[:, ::2]
    assert not any(x.is_contiguous() for x in (stream, rotary, expanded, positions))
    return [stream, rotary, expanded], positions, [1, 2, 1]


def transposed_positions():
    tensors, positions, dims = padded(63, (20, 7, 1), 25)
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
    "padded, batch 1": lambda: padded(63, (20,), 25),
    "padded, batch 3": lambda: padded(63, (20, 7, 1), 25),
    "a batch without rows": lambda: padded(63, (20, 0), 20),
    "bfloat16": lambda: padded(63, (20, 7), 25, torch.bfloat16),
    "float16": lambda: padded(63, (20, 7), 25, torch.float16),
    "int64": lambda: padded(63, (20, 7), 25, torch.int64),
    "bool": lambda: padded(63, (20, 7), 25, torch.bool),
    "non-contiguous": non_contiguous,
    "transposed positions": transposed_positions,
    "same tensor twice": same_tensor_twice,
}


@one("0.3 s each")
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
    forms = [[(x.shape, x.stride(), x.dtype) for x in results] for results in (fake, real)]
    assert forms[0] == forms[1]


def test_fake_of_symbolic_sizes():
    tensors, positions, dims = padded(63, (20, 7), 25)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        positions = mode.from_tensor(positions)
        fake = compact_tokens([mode.from_tensor(x) for x in tensors], positions, dims)
    batch, slots = positions.shape
    assert isinstance(batch, torch.SymInt)
    assert isinstance(slots, torch.SymInt)
    sizes = [list(map(str, x.shape[dim - 1 : dim + 1])) for x, dim in zip(fake, dims, strict=True)]
    assert sizes == [[str(batch), str(slots)]] * len(tensors)
    assert mode.shape_env.guards == []


@pytest.mark.full("6 s; compiled regions hold it in test_routed_model.py")
def test_compiled_reference_matches_loops():
    backend = CompileCounterWithBackend("inductor")
    compiled = torch.compile(compact_tokens_reference, backend=backend, fullgraph=True, dynamic=True)
    for length, active, slots in [(63, (20, 7), 25), (30, (30, 5, 0), 30)]:
        tensors, positions, dims = padded(length, active, slots)
        tensors, dims = [*tensors, tensors[0] > 0], [*dims, 1]
        assert_matches_loops(compiled(tensors, positions, dims), tensors, positions, dims)
    assert backend.frame_count == 1


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


@examples(gate=12, full=50, reason="drawn sizes", derandomize=True)
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
    active = data.draw(st.integers(1, length + 3))
    position = st.integers(0, length + 1) | st.just(2**63 - 1)
    row = st.lists(position, min_size=active, max_size=active)
    positions = torch.tensor(data.draw(st.lists(row, min_size=batch, max_size=batch)))
    dims = [len(lead) + 1]
    assert_matches_loops(compact_tokens([x], positions, dims), [x], positions, dims)
