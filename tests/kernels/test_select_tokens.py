"""`reroute::select_tokens` and `keep_count`: exact indices, ties, schema, fake implementation, properties."""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_examples import NO_TOKEN, SELECTIONS, selection_inputs
from suite_tiers import examples, one
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.library import opcheck

from reroute_fx.kernels import keep_count, select_tokens, select_tokens_reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

PLAIN = [(100, [(63, 63, 7)])]
BATCHES = {
    **SELECTIONS,
    "one row": PLAIN,
    "equal rows": PLAIN * 3,
    "many tokens": [(540, [(500, 500, 1)]), (616, [(576, 576, 80)])],
    "no text, all kept": [(500, [(500, 500, 500)])],
}


def selection_by_loops(scores, visual_index, lengths, keep, pools, length, slots):
    """Active positions and kept tokens by Python's sort of (descending score, position), pool by pool."""
    all_positions, all_kept = [], []
    tensors = scores.double(), visual_index, keep, torch.zeros_like(visual_index) if pools is None else pools
    rows = zip(lengths.tolist(), *(x.tolist() for x in tensors), strict=True)
    for tokens, values, index, places, numbers in rows:
        kept = [False] * len(index)
        for pool in set(numbers):
            entries = [entry for entry, number in enumerate(numbers) if number == pool]
            ranking = [entry for entry in entries if index[entry] < tokens]
            ranking.sort(key=lambda entry: (-values[entry], index[entry]))
            for place, entry in zip(entries, ranking, strict=False):
                kept[entry] = places[place]
        deferred = {place for place, is_kept in zip(index, kept, strict=True) if not is_kept}
        positions = [place for place in range(tokens) if place not in deferred]
        all_positions.append(positions + [length] * (slots - len(positions)))
        all_kept.append(kept)
    return all_positions, all_kept


def assert_matches_loops(result, inputs):
    positions, kept = result
    assert (positions.tolist(), kept.tolist()) == selection_by_loops(*inputs)
    assert (positions.dtype, kept.dtype) == (torch.int64, torch.bool)
    assert positions.is_contiguous()
    assert kept.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES.keys())
def test_matches_loops(rows, dtype):
    inputs = selection_inputs(rows, dtype=dtype)
    assert_matches_loops(select_tokens_reference(*inputs), inputs)


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES.keys())
def test_padded_batches_match_loops(rows):
    inputs = selection_inputs(rows, padding=5, more_slots=3, seed=1)
    assert_matches_loops(select_tokens_reference(*inputs), inputs)


def test_operator_runs_the_reference():
    inputs = selection_inputs(BATCHES["several pools"], padding=3)
    expected = select_tokens_reference(*inputs)
    for operator in (select_tokens, torch.ops.reroute.select_tokens):
        assert all(map(torch.equal, operator(*inputs), expected))


def first(kept, entries):
    """`keep` of one row that keeps the first places."""
    return [place < kept for place in range(entries)]


def test_example_by_hand():
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.9, 0.1, 0.8, -math.inf]])
    visual_index = torch.tensor([[1, 2, 3, 4], [0, 2, 4, 7]])
    keep = torch.tensor([first(2, 4), first(1, 4)])
    positions, kept = select_tokens(scores, visual_index, torch.tensor([7, 6]), keep, None, 7, 6)
    assert kept.tolist() == [[False, True, False, True], [True, False, False, False]]
    assert positions.tolist() == [[0, 2, 4, 5, 6, 7], [0, 1, 3, 5, 7, 7]]


def test_pools_by_hand():
    # The three best scores are in the second pool, which keeps one token.
    scores = torch.tensor([[0.1, 0.2, 0.7, 0.9, 0.8, 0.3]])
    pools = torch.tensor([[0, 0, 1, 1, 1, 2]])
    keep = torch.tensor([first(1, 2) + first(1, 3) + first(1, 1)])
    positions, kept = select_tokens(scores, torch.arange(1, 7)[None], torch.tensor([8]), keep, pools, 8, 5)
    assert kept.tolist() == [[False, True, False, True, False, True]]
    assert positions.tolist() == [[0, 2, 4, 6, 7]]


def test_keep_names_places_of_the_ranking():
    scores, keep = torch.tensor([[0.3, 0.9, 0.5, 0.7]]), torch.tensor([[False, True, False, True]])
    positions, kept = select_tokens(scores, torch.arange(4)[None], torch.tensor([4]), keep, None, 4, 2)
    assert kept.tolist() == [[True, False, False, True]]
    assert positions.tolist() == [[0, 3]]


def test_pools_given_for_one_pool_change_nothing():
    scores, index, lengths, keep, _, *sizes = selection_inputs(
        BATCHES["unequal rows"], padding=2, more_slots=1
    )
    without = select_tokens(scores, index, lengths, keep, None, *sizes)
    pools = (index >= lengths[:, None]).long()
    assert all(map(torch.equal, select_tokens(scores, index, lengths, keep, pools, *sizes), without))


def test_entries_in_the_padding_are_no_tokens():
    scores = torch.tensor([[0.2, 0.1, -math.inf, -math.inf]]).expand(2, 4)
    visual_index = torch.tensor([[1, 2, 4, 5], [1, 2, 6, NO_TOKEN]])
    keep = torch.tensor([first(1, 4)] * 2)
    positions, kept = select_tokens(scores, visual_index, torch.tensor([4, 4]), keep, None, 6, 4)
    assert kept.tolist() == [[True, False, False, False]] * 2
    assert positions.tolist() == [[0, 1, 3, 6]] * 2


@pytest.mark.parametrize("count", [1, 3, 62, 63])
@pytest.mark.parametrize("value", [0.0, 1 / 63, math.inf, -math.inf])
def test_all_equal_scores_keep_the_first_tokens(value, count):
    visual_index = torch.arange(5, 68).expand(2, 63)
    keep, lengths = torch.tensor([first(count, 63)] * 2), torch.tensor([100, 68])
    scores = torch.full((2, 63), value)
    positions, kept = select_tokens(scores, visual_index, lengths, keep, None, 100, 37 + count)
    assert kept.tolist() == keep.tolist()
    assert positions[0].tolist() == [*range(5 + count), *range(68, 100)]
    assert positions[1].tolist() == [*range(5 + count), *[100] * 32]


def test_ties_at_the_cut_go_to_the_lower_position():
    scores = torch.tensor([[0.5, 0.7, 0.5, 0.5, 0.7, 0.5]])
    active = []
    for count in range(1, 7):
        keep = torch.tensor([first(count, 6)])
        active += select_tokens(scores, torch.arange(6)[None], torch.tensor([6]), keep, None, 6, count)[0]
    expected = [[1], [1, 4], [0, 1, 4], [0, 1, 2, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]
    assert [positions.tolist() for positions in active] == expected


def test_ties_go_to_the_lower_position_of_the_same_pool():
    scores, pools = torch.full((1, 6), 0.5), torch.tensor([[0, 0, 0, 1, 1, 1]])
    keep = torch.tensor([first(1, 3) + first(2, 3)])
    _, kept = select_tokens(scores, torch.arange(6)[None], torch.tensor([6]), keep, pools, 6, 3)
    assert kept.tolist() == keep.tolist()


def test_negative_zero_ties_with_zero():
    scores, keep = torch.tensor([[-0.0, 0.0, -0.0, 0.0]]), torch.tensor([first(2, 4)])
    positions, _ = select_tokens(scores, torch.arange(4)[None], torch.tensor([4]), keep, None, 4, 2)
    assert positions.tolist() == [[0, 1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ties_from_rounding_go_to_the_lower_position(dtype):
    scores, *rest = selection_inputs([(540, [(500, 500, 40)]), (520, [(500, 500, 90)])], dtype=dtype)
    scores = (scores / 64).round(decimals=3)
    assert scores.unique().numel() < 40
    assert_matches_loops(select_tokens(scores, *rest), (scores, *rest))


def strided(change):
    """Inputs whose tensors of two dimensions went through `change`."""
    inputs = selection_inputs(BATCHES["several pools after a deletion"], padding=2, more_slots=1, seed=2)
    return tuple(change(x) if isinstance(x, torch.Tensor) and x.dim() == 2 else x for x in inputs)


def transposed():
    return strided(lambda x: x.t().contiguous().t())


def sliced():
    return strided(lambda x: x.repeat_interleave(2, dim=1)[:, ::2])


def expanded():
    inputs = selection_inputs([(100, [(30, 30, 4), (33, 33, 3)])], padding=2, seed=3)
    tensors = [x.expand(3, *x.shape[1:]) for x in inputs[:5]]
    return *tensors, *inputs[5:]


OPCHECK_INPUTS = {
    **{name: lambda rows=rows: selection_inputs(rows) for name, rows in BATCHES.items()},
    "padded": lambda: selection_inputs(BATCHES["unequal rows"], padding=5, more_slots=3),
    "padded, several pools": lambda: selection_inputs(BATCHES["several pools"], padding=5, more_slots=3),
    "bfloat16": lambda: selection_inputs(BATCHES["unequal rows"], dtype=torch.bfloat16),
    "float16": lambda: selection_inputs(BATCHES["several pools"], dtype=torch.float16),
    "transposed": transposed,
    "sliced": sliced,
    "expanded": expanded,
}


@one("0.3 s each")
@pytest.mark.parametrize("inputs", OPCHECK_INPUTS.values(), ids=OPCHECK_INPUTS.keys())
def test_opcheck(inputs):
    opcheck(torch.ops.reroute.select_tokens, inputs())


def faked(mode, inputs):
    return [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in inputs]


def significant_strides(tensor):
    """The stride of a dimension of one element is never used."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]


@pytest.mark.parametrize("inputs", OPCHECK_INPUTS.values(), ids=OPCHECK_INPUTS.keys())
def test_fake_has_the_form_of_the_real_output(inputs):
    inputs = inputs()
    real = select_tokens(*inputs)
    with FakeTensorMode() as mode:
        fake = select_tokens(*faked(mode, inputs))
    assert [x.shape for x in real] == [(len(inputs[0]), inputs[-1]), inputs[0].shape]
    assert [(x.shape, x.dtype) for x in fake] == [(x.shape, x.dtype) for x in real]
    assert [significant_strides(x) for x in fake] == [significant_strides(x) for x in real]


def test_as_many_slots_as_the_stream_has_places():
    inputs = selection_inputs(BATCHES["unequal rows"], padding=4, more_slots=104 - 44)
    assert inputs[-2:] == (104, 104)
    assert_matches_loops(select_tokens(*inputs), inputs)


@pytest.mark.parametrize("name", ["unequal rows", "several pools"])
def test_fake_of_symbolic_sizes(name):
    inputs = selection_inputs(BATCHES[name], padding=5, more_slots=3)
    inputs = *inputs[:5], torch.empty(inputs[5]), torch.empty(inputs[6])
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        *tensors, stream, slots = faked(mode, inputs)
        positions, kept = select_tokens(*tensors, stream.shape[0], slots.shape[0])
    sizes = [*positions.shape, *kept.shape]
    assert all(isinstance(size, torch.SymInt) for size in sizes)
    expected = [tensors[0].shape[0], slots.shape[0], *tensors[0].shape]
    assert list(map(str, sizes)) == list(map(str, expected))
    assert mode.shape_env.guards == []


@pytest.mark.full("7 s; compiled regions hold it in test_routed_model.py")
def test_compiled_reference_matches_loops():
    backend = CompileCounterWithBackend("inductor")
    compiled = torch.compile(select_tokens_reference, backend=backend, fullgraph=True, dynamic=True)
    for name in ("several pools", "several pools after a deletion"):
        inputs = selection_inputs(BATCHES[name], padding=5, more_slots=3)
        assert_matches_loops(compiled(*inputs), inputs)
    assert backend.frame_count == 1


def test_inputs_stay_as_they_were():
    inputs = selection_inputs(BATCHES["several pools"], padding=2)
    copies = [x.clone() for x in inputs[:5]]
    select_tokens(*inputs)
    assert all(map(torch.equal, inputs[:5], copies))


score = st.sampled_from([0.0, -0.0, 0.25, 1.0, math.inf]) | st.floats(-4, 4, width=32)


@st.composite
def pools_of_a_row(draw):
    """Of each entry its pool, its score (None where there is no token), and whether its place is kept."""
    entries = []
    for pool in range(draw(st.integers(0, 3))):
        values = draw(st.lists(st.none() | score, max_size=8))
        tokens = sum(value is not None for value in values)
        keep = draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
        keep += [False] * (len(values) - tokens)
        entries += [(pool, value, kept) for value, kept in zip(values, keep, strict=True)]
    return entries


@st.composite
def selections(draw):
    """Rows with many ties, signed zeros and infinities, and text anywhere between the visual tokens."""
    rows = draw(st.lists(pools_of_a_row(), min_size=1, max_size=3))
    width = max(1, *map(len, rows))
    shuffle = random.Random(draw(st.integers(0, 2**32)))
    scores, visual_index, lengths, keep, pools, active = [], [], [], [], [], []
    for row in rows:
        tokens = [entry for entry, (_, value, _) in enumerate(row) if value is not None]
        lengths.append(len(tokens) + draw(st.integers(0 if tokens else 1, 6)))
        places = iter(sorted(shuffle.sample(range(lengths[-1]), len(tokens))))
        visual_index.append([next(places) if entry in tokens else NO_TOKEN for entry in range(width)])
        row = row + [(3, None, False)] * (width - len(row))
        pools.append([pool for pool, _, _ in row])
        scores.append([-math.inf if value is None else value for _, value, _ in row])
        keep.append([kept for *_, kept in row])
        active.append(lengths[-1] - len(tokens) + sum(keep[-1]))
    length = max(lengths) + draw(st.integers(0, 3))
    slots = draw(st.integers(max(active), length))
    several = draw(st.booleans())
    if not several:
        # In a single ranking the tokens of the row come first, those that are none last and never kept.
        keep = [sorted(row, reverse=True) for row in keep]
    tensors = map(torch.tensor, (scores, visual_index, lengths, keep))
    return *tensors, torch.tensor(pools) if several else None, length, slots


@examples(gate=25, full=100, reason="drawn sizes", derandomize=True)
@given(inputs=selections())
def test_selection_properties(inputs):
    _, visual_index, lengths, keep, _, length, slots = inputs
    result = positions, kept = select_tokens(*inputs)
    assert_matches_loops(result, inputs)
    assert torch.equal(kept.sum(dim=1), keep.sum(dim=1))
    assert not kept[visual_index >= lengths[:, None]].any()
    for row, tokens in enumerate(lengths.tolist()):
        active = [place for place in positions[row].tolist() if place < length]
        visual = {place for place in visual_index[row].tolist() if place < tokens}
        assert active == sorted(set(active))
        assert set(active) - visual == set(range(tokens)) - visual
        assert set(active) & visual == set(visual_index[row, kept[row]].tolist())
        assert positions[row].tolist() == active + [length] * (slots - len(active))


@examples(gate=7, full=30, reason="drawn sizes", derandomize=True)
@given(inputs=selections())
def test_rows_are_selected_independently(inputs):
    *tensors, length, slots = inputs
    together = select_tokens(*inputs)
    rows = range(len(tensors[0]))
    each = [[None if x is None else x[row : row + 1] for x in tensors] for row in rows]
    apart = [select_tokens(*row, length, slots) for row in each]
    assert all(map(torch.equal, together, map(torch.cat, zip(*apart, strict=True))))


@examples(gate=100, full=400, reason="drawn sizes", derandomize=True)
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


@pytest.mark.parametrize(
    ("tokens", "ratio", "count"),
    [(576, 0.1, 57), (576, 0.9, 518), (576, 1.0, 576), (10, 0.1, 1), (9, 0.1, 1), (1, 1e-9, 1), (3, 0.5, 1)],
)
def test_keep_count_by_hand(tokens, ratio, count):
    assert keep_count(tokens, ratio) == count


@pytest.mark.parametrize("ratio", [1e-9, 0.5, 1, 1.0])
def test_nothing_is_kept_of_nothing(ratio):
    assert keep_count(0, ratio) == 0
    assert type(keep_count(0, ratio)) is int
