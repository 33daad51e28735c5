"""`reroute::select_tokens` as Triton kernels, interpreted: exactly what the reference selects."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_examples import NO_TOKEN, SELECTIONS, selection_inputs
from suite_tiers import examples, pairs, singles
from torch.library import opcheck

from reroute_fx.kernels import select_tokens_reference
from reroute_fx.kernels.select_tokens import triton as kernels

NAN_OF_OTHER_SIGN = torch.tensor([-1], dtype=torch.int32).view(torch.float32).item()

BATCHES = {
    **SELECTIONS,
    "one of one entry": [(9, [(1, 1, 1)])],
    "equal rows": [(100, [(63, 63, 7)])] * 2,
    "no text, all kept": [(65, [(65, 65, 65)])],
    "text, all kept": [(80, [(65, 65, 65)]), (70, [(60, 60, 60)])],
    "nothing kept": [(80, [(65, 65, 0)])],
    "more tokens than a block": [(200, [(kernels.BLOCK_OTHERS + 1, 110, 30)]), (190, [(90, 90, 5)])],
    "pools over blocks": [(300, [(100, 100, 30), (150, 150, 20)]), (290, [(20, 20, 5), (230, 230, 200)])],
}

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=["as they are", "small", "others smaller", "slots larger"])
def blocks(request, monkeypatch):
    """Sizes of the blocks."""
    sizes = {
        "small": {"BLOCK": 32, "BLOCK_OTHERS": 64, "BLOCK_SLOTS": 32, "BLOCK_TOKENS": 64},
        "others smaller": {"BLOCK": 128, "BLOCK_OTHERS": 32},
        "slots larger": {"BLOCK_SLOTS": 128, "BLOCK_TOKENS": 32},
    }
    for name, size in sizes.get(request.param, {}).items():
        monkeypatch.setattr(kernels, name, size)


def distinct(count, generator):
    return torch.randperm(count, generator=generator) / count


def ties(count, generator):
    return torch.randint(3, (count,), generator=generator) / 2


def equal(count, generator):
    return torch.full((count,), 0.25)


def special(count, generator):
    values = [0.0, -0.0, 1.0, math.nan, NAN_OF_OTHER_SIGN, math.inf, -1.0, 3e38, -3e38, 1e-45, -1e-45, 1e-39]
    return torch.tensor(values)[torch.randint(len(values), (count,), generator=generator)]


SCORES = (distinct, ties, equal, special)


def example(rows, values=distinct, padding=0, more_slots=0, dtype=torch.float32, seed=0):
    """One slot at least, and not more than there are places."""
    *inputs, length, slots = selection_inputs(rows, values, padding, more_slots, dtype, seed)
    return *inputs, length, min(max(slots, 1 + more_slots), length)


def assert_matches_reference(inputs):
    copies = [None if x is None else x.clone() for x in inputs[:5]]
    results = torch.ops.reroute.select_tokens_triton(*inputs)
    for result, expected in zip(results, select_tokens_reference(*copies, *inputs[5:]), strict=True):
        assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
        assert result.is_contiguous()
        assert torch.equal(result, expected)
    for x, copy in zip(inputs[:5], copies, strict=True):
        assert x is copy or torch.equal(x.nan_to_num(0), copy.nan_to_num(0))


@singles("interpreted kernels are slow")
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.usefixtures("blocks")
def test_matches_reference(rows):
    assert_matches_reference(example(rows))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES.keys())
def test_padded_batches_of_other_dtypes(rows, dtype):
    assert_matches_reference(example(rows, padding=5, more_slots=3, dtype=dtype, seed=1))


@pairs("interpreted kernels are slow")
@pytest.mark.parametrize("values", SCORES)
@pytest.mark.parametrize("name", ["unequal rows", "several pools after a deletion", "pools over blocks"])
@pytest.mark.usefixtures("blocks")
def test_ties_and_special_scores(name, values):
    assert_matches_reference(example(BATCHES[name], values, padding=1, more_slots=2, seed=2))


@singles("interpreted kernels are slow")
@pytest.mark.parametrize("value", [0.0, -0.0, 1 / 63, math.inf, -math.inf, math.nan, NAN_OF_OTHER_SIGN])
@pytest.mark.parametrize("count", [0, 1, 63, 129, 130])
def test_all_equal_scores_keep_the_first_tokens(value, count):
    keep = (torch.arange(130) < count)[None]
    scores, index = torch.full((1, 130), value), torch.arange(3, 133)[None]
    inputs = scores, index, torch.tensor([140]), keep, None, 150, 10 + count
    positions, kept = torch.ops.reroute.select_tokens_triton(*inputs)
    assert torch.equal(kept, keep)
    assert positions.tolist() == [[*range(3 + count), *range(133, 140)]]
    assert_matches_reference(inputs)


def test_nan_ranks_first_whatever_its_sign():
    scores = torch.tensor([[1.0, math.inf, NAN_OF_OTHER_SIGN, -math.inf, math.nan, NAN_OF_OTHER_SIGN]])
    keep = torch.tensor([[False, False, True, True, False, False]])
    inputs = scores, torch.arange(6)[None], torch.tensor([6]), keep, None, 6, 2
    assert torch.ops.reroute.select_tokens_triton(*inputs)[0].tolist() == [[1, 5]]
    assert_matches_reference(inputs)


@pytest.mark.parametrize("numbers", [(0, 1, 2), (7, 8, 900), (0, 2**31, NO_TOKEN)])
@pytest.mark.usefixtures("blocks")
def test_pools_may_have_any_numbers(numbers):
    *tensors, pools, length, slots = example([(40, [(2, 2, 1), (3, 2, 2), (4, 4, 3)])], seed=3)
    inputs = *tensors, torch.tensor(numbers)[pools], length, slots
    assert_matches_reference(inputs)
    assert_matches_reference((*(x[:, -4:] if x.dim() == 2 else x for x in inputs[:5]), length, length))


def test_entries_in_the_padding_are_no_tokens():
    scores = torch.tensor([[0.2, 0.1, -math.inf, -math.inf]]).expand(2, 4)
    visual_index = torch.tensor([[1, 2, 4, 5], [1, 2, 6, NO_TOKEN]])
    keep = torch.tensor([[True, False, False, False]]).expand(2, 4)
    assert_matches_reference((scores, visual_index, torch.tensor([4, 4]), keep, None, 6, 4))


def test_no_entries_at_all():
    empty = torch.zeros(2, 0)
    inputs = empty, empty.long(), torch.tensor([5, 9]), empty.bool(), None, 10, 9
    assert_matches_reference(inputs)
    assert_matches_reference((*inputs[:4], empty.long(), 10, 9))


@pytest.fixture
def large_blocks(monkeypatch):
    """Fewer and larger blocks: each costs the interpreter much the same."""
    for name, size in {"BLOCK": 256, "BLOCK_OTHERS": 512, "BLOCK_SLOTS": 256, "BLOCK_TOKENS": 1024}.items():
        monkeypatch.setattr(kernels, name, size)


@pytest.mark.parametrize("slots", [kernels.BLOCK_SLOTS + more for more in (-1, 0, 1)])
def test_slots_around_the_size_of_a_block(slots):
    assert_matches_reference(example([(slots + 30, [(40, 40, 10)]), (9, [(5, 5, 1)])], padding=7))


@singles("interpreted kernels are slow")
@pytest.mark.parametrize("values", SCORES)
@pytest.mark.parametrize("tokens", [2304, 4096, 4097])
@pytest.mark.usefixtures("large_blocks")
def test_many_tokens(tokens, values):
    assert_matches_reference(example([(tokens + 40, [(tokens, tokens, tokens // 4)])], values, seed=4))


@pytest.mark.parametrize(
    "change",
    [lambda x: x.t().contiguous().t(), lambda x: x.repeat_interleave(2, dim=1)[:, ::2]],
    ids=["transposed", "sliced"],
)
def test_strided_inputs(change):
    inputs = example(BATCHES["several pools after a deletion"], padding=2, more_slots=1, seed=5)
    changed = [change(x) if x.dim() == 2 else x.repeat_interleave(2)[::2] for x in inputs[:5]]
    assert not any(x.is_contiguous() for x in changed)
    assert_matches_reference((*changed, *inputs[5:]))


def test_expanded_inputs():
    inputs = example([(100, [(30, 30, 4), (33, 33, 3)])], padding=2, seed=6)
    assert_matches_reference((*(x.expand(3, *x.shape[1:]) for x in inputs[:5]), *inputs[5:]))


@st.composite
def batches(draw):
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        pools = []
        for _ in range(draw(st.integers(0, 3))):
            entries = draw(st.integers(1, 40))
            tokens = draw(st.integers(0, entries))
            pools.append((entries, tokens, draw(st.integers(0, tokens))))
        text = draw(st.integers(0 if any(tokens for _, tokens, _ in pools) else 1, 6))
        rows.append((text + sum(tokens for _, tokens, _ in pools), pools))
    return rows


@examples(gate=6, full=40, reason="drawn sizes", derandomize=True)
@given(
    rows=batches(),
    values=st.sampled_from(SCORES),
    padding=st.integers(0, 3),
    more_slots=st.integers(0, 3),
    seed=st.integers(0, 2**32),
    block=st.sampled_from([16, 32, 128]),
    block_slots=st.sampled_from([4, 16, 64]),
)
def test_any_batch_matches_reference(rows, values, padding, more_slots, seed, block, block_slots):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "BLOCK", block)
        patch.setattr(kernels, "BLOCK_SLOTS", block_slots)
        assert_matches_reference(example(rows, values, padding, more_slots, seed=seed))


@examples(gate=2, full=30, reason="long rows take the interpreter seconds", derandomize=True)
@given(
    tokens=st.integers(1, 4500),
    kept=st.floats(0, 1),
    text=st.integers(1, 60),
    pools=st.integers(1, 3),
    values=st.sampled_from(SCORES),
    seed=st.integers(0, 2**32),
)
@pytest.mark.usefixtures("large_blocks")
def test_rows_of_any_length_match_reference(tokens, kept, text, pools, values, seed):
    sizes = [tokens // pools] * (pools - 1) + [tokens - tokens // pools * (pools - 1)]
    row = (tokens + text, [(size, size, int(size * kept)) for size in sizes])
    assert_matches_reference(example([row], values, seed=seed))


@examples(gate=8, full=100, reason="drawn sizes", derandomize=True)
@given(data=st.data(), tokens=st.integers(1, 60), dropped_before=st.integers(0, 5))
def test_any_places_of_the_ranking_may_be_kept(data, tokens, dropped_before):
    """Not only the first ones."""
    keep = torch.tensor([data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))])
    scores = torch.tensor([data.draw(st.lists(st.integers(-2, 2), min_size=tokens, max_size=tokens))]) / 2
    index, length = torch.arange(tokens)[None] + dropped_before, tokens + dropped_before + 1
    slots = length - int((~keep).sum())
    assert_matches_reference((scores, index, torch.tensor([length]), keep, None, length, slots))


def test_schema():
    inputs = example(BATCHES["several pools"], padding=5, more_slots=3)
    opcheck(torch.ops.reroute.select_tokens_triton, inputs, test_utils="test_schema")
