"""`reroute::select_tokens` and `keep_count`: exact indices, ties, schema, fake implementation, properties."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from reroute_fx.kernels import keep_count, select_tokens, select_tokens_reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# batch, visual tokens, kept, rows
SIZES = (
    (1, 63, 7, 100),
    (3, 63, 7, 100),
    (3, 500, 1, 540),
    (1, 500, 500, 500),
    (2, 576, 80, 616),
    (1, 1, 1, 1),
    (3, 1, 1, 12),
)


def example(batch, tokens, keep, length, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(batch, tokens, generator=generator).to(dtype)
    index = [torch.randperm(length, generator=generator)[:tokens].sort().values for _ in range(batch)]
    return scores, torch.stack(index), keep, length


def selection_by_loops(scores, visual_index, keep, length):
    """Active positions and kept tokens by Python's sort of (descending score, position)."""
    positions, selected = [], []
    for row, index in zip(scores.double().tolist(), visual_index.tolist(), strict=True):
        best = sorted(range(len(row)), key=lambda token: (-row[token], token))[:keep]
        deferred = {index[token] for token in range(len(row)) if token not in best}
        positions.append([position for position in range(length) if position not in deferred])
        selected.append(sorted(best))
    return positions, selected


def assert_matches_loops(result, inputs):
    positions, selected = result
    assert (positions.tolist(), selected.tolist()) == selection_by_loops(*inputs)
    assert positions.dtype is selected.dtype is torch.int64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_matches_loops(sizes, dtype):
    inputs = example(*sizes, dtype=dtype)
    assert_matches_loops(select_tokens_reference(*inputs), inputs)


def test_operator_runs_the_reference():
    inputs = example(3, 63, 7, 100)
    expected = select_tokens_reference(*inputs)
    for operator in (select_tokens, torch.ops.reroute.select_tokens):
        assert all(map(torch.equal, operator(*inputs), expected))


def test_example_by_hand():
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.9, 0.1, 0.8, 0.2]])
    visual_index = torch.tensor([[1, 2, 3, 4], [0, 2, 4, 6]])
    positions, selected = select_tokens(scores, visual_index, 2, 7)
    assert selected.tolist() == [[1, 3], [0, 2]]
    assert positions.tolist() == [[0, 2, 4, 5, 6], [0, 1, 3, 4, 5]]


@pytest.mark.parametrize("keep", [1, 3, 62, 63])
@pytest.mark.parametrize("value", [0.0, 1 / 63, math.inf, -math.inf])
def test_all_equal_scores_keep_the_first_tokens(value, keep):
    visual_index = torch.arange(5, 68).expand(2, 63)
    positions, selected = select_tokens(torch.full((2, 63), value), visual_index, keep, 100)
    assert selected.tolist() == [list(range(keep))] * 2
    assert positions.tolist() == [[*range(5 + keep), *range(68, 100)]] * 2


def test_ties_at_the_cut_go_to_the_lower_position():
    scores = torch.tensor([[0.5, 0.7, 0.5, 0.5, 0.7, 0.5]])
    visual_index = torch.arange(6)[None]
    kept = [select_tokens(scores, visual_index, keep, 6)[1].tolist() for keep in range(1, 7)]
    assert kept == [[[1]], [[1, 4]], [[0, 1, 4]], [[0, 1, 2, 4]], [[0, 1, 2, 3, 4]], [[0, 1, 2, 3, 4, 5]]]


def test_negative_zero_ties_with_zero():
    scores = torch.tensor([[-0.0, 0.0, -0.0, 0.0]])
    _, selected = select_tokens(scores, torch.arange(4)[None], 2, 4)
    assert selected.tolist() == [[0, 1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ties_from_rounding_go_to_the_lower_position(dtype):
    scores, visual_index, keep, length = example(3, 500, 40, 540, dtype=dtype)
    scores = (scores / 64).round(decimals=3)
    assert scores.unique().numel() < 40
    assert_matches_loops(
        select_tokens(scores, visual_index, keep, length), (scores, visual_index, keep, length)
    )


def transposed_scores():
    scores, visual_index, keep, length = example(3, 63, 7, 100, seed=1)
    return scores.t().contiguous().t(), visual_index, keep, length


def sliced_inputs():
    scores, visual_index, keep, length = example(3, 63, 7, 100, seed=2)
    scores, visual_index = (x.repeat_interleave(2, dim=1)[:, ::2] for x in (scores, visual_index))
    return scores, visual_index, keep, length


def expanded_inputs():
    scores, visual_index, keep, length = example(1, 63, 7, 100, seed=3)
    return scores.expand(3, -1), visual_index.expand(3, -1), keep, length


OPCHECK_INPUTS = {
    "batch 1": lambda: example(1, 63, 7, 100),
    "batch 3": lambda: example(3, 63, 7, 100),
    "one kept": lambda: example(3, 63, 1, 100),
    "all kept": lambda: example(3, 63, 63, 100),
    "no text": lambda: example(1, 500, 80, 500),
    "one row": lambda: example(1, 1, 1, 1),
    "bfloat16": lambda: example(2, 63, 7, 100, dtype=torch.bfloat16),
    "float16": lambda: example(2, 63, 7, 100, dtype=torch.float16),
    "transposed scores": transposed_scores,
    "sliced": sliced_inputs,
    "expanded": expanded_inputs,
}


@pytest.mark.parametrize("inputs", OPCHECK_INPUTS.values(), ids=OPCHECK_INPUTS.keys())
def test_opcheck(inputs):
    opcheck(torch.ops.reroute.select_tokens, inputs())


@pytest.mark.parametrize("inputs", OPCHECK_INPUTS.values(), ids=OPCHECK_INPUTS.keys())
def test_fake_has_the_form_of_the_real_output(inputs):
    scores, visual_index, keep, length = inputs()
    batch, tokens = scores.shape
    real = select_tokens(scores, visual_index, keep, length)
    with FakeTensorMode() as mode:
        fake = select_tokens(mode.from_tensor(scores), mode.from_tensor(visual_index), keep, length)
    assert [x.shape for x in real] == [(batch, length - tokens + keep), (batch, keep)]
    assert all(x.is_contiguous() for x in (*real, *fake))
    assert [(x.shape, x.dtype) for x in fake] == [(x.shape, x.dtype) for x in real]


@pytest.mark.parametrize("inputs", [transposed_scores, sliced_inputs, expanded_inputs])
def test_strided_inputs_match_loops(inputs):
    inputs = inputs()
    assert_matches_loops(select_tokens(*inputs), inputs)


def test_inputs_stay_as_they_were():
    scores, visual_index, keep, length = example(3, 63, 7, 100)
    copies = scores.clone(), visual_index.clone()
    select_tokens(scores, visual_index, keep, length)
    assert all(map(torch.equal, (scores, visual_index), copies))


@st.composite
def selections(draw):
    """Inputs with many ties, signed zeros and infinities, and text anywhere between the visual tokens."""
    batch, tokens, text = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(0, 12))
    keep, length = draw(st.integers(1, tokens)), tokens + text
    value = st.sampled_from([0.0, -0.0, 0.25, 1.0, math.inf, -math.inf]) | st.floats(-4, 4, width=32)
    row = st.lists(value, min_size=tokens, max_size=tokens)
    scores = draw(st.lists(row, min_size=batch, max_size=batch))
    shuffle = random.Random(draw(st.integers(0, 2**32)))
    index = [sorted(shuffle.sample(range(length), tokens)) for _ in range(batch)]
    return torch.tensor(scores), torch.tensor(index), keep, length


@settings(max_examples=80, deadline=None, derandomize=True)
@given(inputs=selections())
def test_selection_properties(inputs):
    scores, visual_index, _, length = inputs
    result = positions, selected = select_tokens(*inputs)
    assert_matches_loops(result, inputs)
    assert (positions.diff(dim=1) > 0).all()
    assert (selected.diff(dim=1) > 0).all()
    for row in range(len(scores)):
        active, visual = set(positions[row].tolist()), visual_index[row].tolist()
        kept = selected[row].tolist()
        assert active >= set(range(length)) - set(visual)
        assert active & set(visual) == {visual[token] for token in kept}
        deferred = [token for token in range(len(visual)) if token not in kept]
        assert not deferred or scores[row, kept].min() >= scores[row, deferred].max()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(inputs=selections())
def test_batches_are_selected_independently(inputs):
    scores, visual_index, keep, length = inputs
    together = select_tokens(*inputs)
    apart = [
        select_tokens(row[None], index[None], keep, length)
        for row, index in zip(scores, visual_index, strict=True)
    ]
    assert all(map(torch.equal, together, map(torch.cat, zip(*apart, strict=True))))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(tokens=st.integers(1, 20_000), ratio=st.floats(0, 1, exclude_min=True))
def test_keep_count_truncates_and_keeps_one(tokens, ratio):
    count = keep_count(tokens, ratio)
    assert count == max(1, int(tokens * ratio))
    assert type(count) is int
    assert 1 <= count <= tokens


@pytest.mark.parametrize("ratio", [1 / 3, 0.5, 0.2644, 0.01916, 0.0106, 1e-9, 1, 1.0])
def test_keep_count_for_every_prompt_up_to_1200_tokens(ratio):
    counts = [keep_count(tokens, ratio) for tokens in range(1, 1201)]
    assert counts == [max(1, int(tokens * ratio)) for tokens in range(1, 1201)]


def test_keep_count_of_a_symbolic_number_of_tokens():
    class KeepCount(torch.nn.Module):
        def forward(self, tokens):
            return tokens + 1, keep_count(tokens.shape[0], 0.1392)

    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(KeepCount(), (torch.arange(576),), dynamic_shapes={"tokens": {0: length}})
    for tokens in (2, 7, 8, 63, 500, 576, 4096):
        _, count = program.module()(torch.arange(tokens))
        assert count == max(1, int(tokens * 0.1392))
