"""`reroute::restore_tokens`: against loops over rows, with its schema, fake implementation and properties."""

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

from reroute_fx.kernels import compact_tokens, restore_tokens, restore_tokens_reference, select_tokens

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def example(batch, length, active, width=6, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    stream = torch.randn(batch, length, width, generator=generator).to(dtype)
    rows = torch.randn(batch, active, width, generator=generator).to(dtype)
    positions = [torch.randperm(length, generator=generator)[:active].sort().values for _ in range(batch)]
    return stream, rows, torch.stack(positions)


def padded(length, active, slots, width=6, dtype=torch.float32, seed=0):
    """`active` names how many of the `slots` rows of each batch have a place in the stream.

    The others have positions at and past its end, each of them several times, and are not numbers.
    """
    stream, rows, _ = example(len(active), length, 1, width, dtype=dtype, seed=seed)
    rows = rows.repeat(1, slots, 1) + torch.arange(slots)[:, None].to(dtype)
    positions = torch.tensor([length, length, length + 1, 2**63 - 1]).repeat(slots)[:slots]
    positions = positions.repeat(len(active), 1)
    for batch, count in enumerate(active):
        positions[batch, :count] = example(1, length, count, seed=seed + batch)[2]
    return stream, rows.masked_fill((positions >= length)[:, :, None], math.nan), positions


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "length", "active"), [(1, 63, 20), (3, 63, 20), (3, 500, 1), (2, 63, 63), (1, 1, 1)]
)
def test_matches_loops(batch, length, active, dtype):
    inputs = example(batch, length, active, dtype=dtype)
    result = restore_tokens_reference(*inputs)
    assert result.dtype is dtype
    assert result.tolist() == stream_by_loops(*inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("length", "active", "slots"),
    [(63, (20, 7, 1), 20), (63, (20,), 30), (63, (63, 0, 5), 63), (9, (9, 4), 15), (1, (1, 0), 2)],
)
def test_padded_positions_match_loops(length, active, slots, dtype):
    inputs = padded(length, active, slots, dtype=dtype)
    result = restore_tokens_reference(*inputs)
    assert result.dtype is dtype
    assert result.is_contiguous()
    assert not result.isnan().any()
    assert result.tolist() == stream_by_loops(*inputs)


def test_rows_without_a_place_may_stand_anywhere():
    stream, rows = torch.zeros(2, 3, 1), torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]])
    result = restore_tokens(stream, rows, torch.tensor([[3, 0, 3], [2, 9, 1]]))
    assert result.tolist() == [[[2], [0], [0]], [[0], [6], [4]]]


def test_integers_are_written_as_they_are():
    stream = torch.arange(2**62, 2**62 + 6).reshape(2, 3, 1)
    result = restore_tokens(stream, -stream, torch.tensor([[2, 3, 3], [0, 1, 3]]))
    low = 2**62
    assert result.flatten().tolist() == [low, low + 1, -low, -low - 3, -low - 4, low + 5]


def test_operator_runs_the_reference():
    inputs = padded(63, (20, 7, 1), 25)
    for operator in (restore_tokens, torch.ops.reroute.restore_tokens):
        assert torch.equal(operator(*inputs), restore_tokens_reference(*inputs))


def test_example_by_hand():
    stream = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]])
    rows = torch.tensor([[[-1.0], [-3.0]], [[-5.0], [-6.0]]])
    result = restore_tokens(stream, rows, torch.tensor([[0, 2], [1, 2]]))
    assert result.tolist() == [[[-1], [2], [-3]], [[4], [-5], [-6]]]


def non_contiguous():
    stream, rows, positions = padded(63, (20, 7, 1), 25, seed=1)
    stream = stream.transpose(0, 1).contiguous().transpose(0, 1)
    rows = rows.transpose(1, 2).contiguous().transpose(1, 2)
    positions = positions.t().contiguous().t()
    assert not any(x.is_contiguous() for x in (stream, rows, positions))
    return stream, rows, positions


def expanded():
    stream, rows, positions = padded(63, (20,), 25, seed=2)
    return stream.expand(3, -1, -1), rows.expand(3, -1, -1), positions.expand(3, -1)


OPCHECK_INPUTS = {
    "batch 1": lambda: example(1, 63, 20),
    "batch 3": lambda: example(3, 63, 20),
    "one active": lambda: example(3, 500, 1),
    "all active": lambda: example(2, 63, 63),
    "one row": lambda: example(1, 1, 1),
    "padded, batch 1": lambda: padded(63, (20,), 25),
    "padded, batch 3": lambda: padded(63, (20, 7, 1), 25),
    "a batch without rows": lambda: padded(63, (20, 0), 20),
    "more rows than places": lambda: padded(9, (9, 4), 15),
    "bfloat16": lambda: padded(63, (20, 7), 25, dtype=torch.bfloat16),
    "float16": lambda: padded(63, (20, 7), 25, dtype=torch.float16),
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
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    assert (real.shape, real.dtype) == (inputs[0].shape, inputs[0].dtype)


def test_fake_of_symbolic_sizes():
    inputs = padded(63, (20, 7), 25)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        stream, rows, positions = map(mode.from_tensor, inputs)
        fake = restore_tokens(stream, rows, positions)
    assert all(isinstance(size, torch.SymInt) for size in fake.shape)
    assert list(map(str, fake.shape)) == list(map(str, stream.shape))
    assert mode.shape_env.guards == []


def test_compiled_reference_matches_loops():
    backend = CompileCounterWithBackend("inductor")
    compiled = torch.compile(restore_tokens_reference, backend=backend, fullgraph=True, dynamic=True)
    for sizes in [(63, (20, 7, 2), 25), (30, (30, 5), 32)]:
        inputs = padded(*sizes)
        assert compiled(*inputs).tolist() == stream_by_loops(*inputs)
    assert backend.frame_count == 1


@pytest.mark.parametrize("inputs", [non_contiguous, expanded])
def test_strided_inputs_match_loops(inputs):
    inputs = inputs()
    assert restore_tokens(*inputs).tolist() == stream_by_loops(*inputs)


def test_inputs_stay_as_they_were():
    inputs = example(3, 63, 20)
    inputs[2][:, 15:] = 63
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


seeds = st.integers(0, 2**32)


@st.composite
def padded_rows(draw):
    active = draw(st.lists(st.integers(0, 20), min_size=1, max_size=3))
    length = draw(st.integers(max(1, *active), 40))
    slots = draw(st.integers(max(1, *active), 45))
    return padded(length, active, slots, width=draw(st.integers(1, 5)), seed=draw(seeds))


@examples(gate=12, full=50, reason="drawn sizes", derandomize=True)
@given(inputs=padded_rows())
def test_any_shape_matches_loops(inputs):
    assert restore_tokens(*inputs).tolist() == stream_by_loops(*inputs)


@examples(gate=12, full=50, reason="drawn sizes", derandomize=True)
@given(inputs=padded_rows())
def test_restoring_compacted_rows_gives_the_stream(inputs):
    stream, _, positions = inputs
    (rows,) = compact_tokens([stream], positions, [1])
    assert torch.equal(restore_tokens(stream, rows, positions), stream)


@examples(gate=12, full=50, reason="drawn sizes", derandomize=True)
@given(inputs=padded_rows())
def test_compacting_restored_rows_gives_the_rows(inputs):
    _, rows, positions = inputs
    (again,) = compact_tokens([restore_tokens(*inputs)], positions, [1])
    # Rows without a place come back as zeros.
    assert torch.equal(again, rows.nan_to_num(0))


@examples(gate=12, full=50, reason="drawn sizes", derandomize=True)
@given(
    rows=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8)), min_size=1, max_size=3),
    padding=st.integers(0, 3),
    seed=seeds,
    data=st.data(),
)
def test_a_stage_changes_active_rows_only(rows, padding, seed, data):
    lengths = torch.tensor([visual + text for visual, text in rows])
    kept = [data.draw(st.integers(1, visual)) if visual else 0 for visual, _ in rows]
    length, width = int(lengths.max()) + padding, max(1, *(visual for visual, _ in rows))
    slots = max(text + k for (_, text), k in zip(rows, kept, strict=True))
    keep = torch.arange(width) < torch.tensor(kept)[:, None]
    scores = torch.full((len(rows), width), -torch.inf)
    visual_index = torch.full((len(rows), width), length)
    for row, (visual, text) in enumerate(rows):
        _, values, places = example(1, visual + text, visual, width=1, seed=seed + row)
        scores[row, :visual], visual_index[row, :visual] = values[0, :, 0], places[0]
    positions, chosen = select_tokens(scores, visual_index, lengths, keep, None, length, slots)
    stream, _, _ = example(len(rows), length, 1, width=3, seed=seed)
    (compact,) = compact_tokens([stream], positions, [1])
    result = restore_tokens(stream, compact + 1, positions)

    place = torch.arange(length)
    is_visual = (visual_index[:, :, None] == place).any(dim=1)
    is_kept = ((visual_index[:, :, None] == place) & chosen[:, :, None]).any(dim=1)
    active = (place < lengths[:, None]) & (is_kept | ~is_visual)
    assert active.sum(dim=1).tolist() == [text + k for (_, text), k in zip(rows, kept, strict=True)]
    assert torch.equal(result[~active], stream[~active])
    assert torch.equal(result[active], stream[active] + 1)
