"""`reroute::visual_scores`: against float64 loops; schema, fake implementation and properties."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_examples import scoring_inputs
from suite_tiers import examples, one
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.library import opcheck

from reroute_fx.kernels import visual_scores, visual_scores_reference

EPSILON = torch.finfo(torch.float32).eps
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# heads, key-value heads, places, head dimension, and for each row its length and its visual tokens
SHAPES = (
    (4, 4, 63, 16, (63,), (40,)),
    (8, 2, 500, 32, (500, 263, 1), (333, 200, 0)),
    (2, 1, 1, 8, (1,), (1,)),
    (6, 3, 63, 5, (63, 63), (63, 63)),
    (4, 1, 129, 64, (100, 129, 2), (1, 0, 1)),
    (6, 2, 20, 8, (1, 20, 7), (1, 5, 7)),
)


def scores_by_loops(query, keys, visual_index, lengths, scale):
    """Scores in float64, and how far a float32 evaluation may be from each of them."""
    head_dim, heads = keys.shape[3], query.shape[1]
    all_scores, all_errors = [], []
    inputs = (x.tolist() for x in (query.double(), keys.double(), visual_index, lengths))
    for query_heads, key_heads, index, length in zip(*inputs, strict=True):
        group = len(query_heads) // len(key_heads)
        attention = [0.0] * length
        relative_error = 0.0
        for head, (vector,) in enumerate(query_heads):
            seen = key_heads[head // group][:length]
            products = [[a * b for a, b in zip(vector, key, strict=True)] for key in seen]
            logits = [scale * math.fsum(p) for p in products]
            magnitude = max(scale * math.fsum(map(abs, p)) for p in products)
            peak = max(logits)
            exponentials = [math.exp(logit - peak) for logit in logits]
            total = math.fsum(exponentials)
            for row, exponential in enumerate(exponentials):
                attention[row] += exponential / total / heads
            # A float32 dot product of D terms is off by at most D roundings of the sum of the absolute
            # products, one more for the scale. A logit's error enters the softmax twice: in its own
            # exponential and in the total. Then come the rounding of `logit - peak`, the sums over rows and
            # heads, and 8 roundings for the exponential, the division and the mean. A rounding is half an
            # epsilon; counting a whole one leaves a factor of 2. Padding adds exact zeros to the sums.
            logit_error = (head_dim + 1) * magnitude
            relative_error = max(relative_error, 2 * logit_error + peak - min(logits) + length + heads + 8)
        scores = [attention[place] if place < length else -math.inf for place in index]
        all_scores.append(scores)
        # Exponentials below the normal range lose digits; none is off by more than the smallest normal.
        all_errors.append([abs(score) * relative_error * EPSILON + SMALLEST_NORMAL for score in scores])
    return torch.tensor(all_scores, dtype=torch.float64), torch.tensor(all_errors, dtype=torch.float64)


def assert_matches_loops(scores, *inputs):
    expected, tolerance = scores_by_loops(*inputs)
    is_token = expected > -math.inf
    assert scores.dtype is torch.float32
    assert (scores[~is_token] == -math.inf).all()
    scores, expected, tolerance = (x[is_token].double() for x in (scores, expected, tolerance))
    # A bound as wide as a bfloat16 rounding would let 16-bit arithmetic pass.
    assert (tolerance < expected * torch.finfo(torch.bfloat16).eps / 2).all()
    assert ((scores - expected).abs() <= tolerance).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64_loops(shape, dtype):
    inputs = scoring_inputs(*shape, dtype=dtype)
    assert_matches_loops(visual_scores_reference(*inputs), *inputs)


def ragged(dtype=torch.float32, seed=0):
    return scoring_inputs(8, 2, 63, 16, (63, 40, 1, 9), (40, 17, 1, 0), dtype=dtype, seed=seed)


def test_operator_runs_the_reference():
    inputs = ragged()
    assert torch.equal(visual_scores(*inputs), visual_scores_reference(*inputs))
    assert torch.equal(torch.ops.reroute.visual_scores(*inputs), visual_scores_reference(*inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_computes_in_float32_whatever_the_inputs(dtype):
    query, keys, *rest = ragged(dtype)
    in_half = visual_scores(query, keys, *rest)
    in_single = visual_scores(query.float(), keys.float(), *rest)
    assert in_half.dtype is torch.float32
    assert torch.equal(in_half, in_single)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("garbage", ["largest", "lowest", "infinite", "not a number"])
def test_keys_behind_the_length_change_no_score(garbage, dtype):
    query, keys, visual_index, lengths, scale = ragged(dtype)
    largest = torch.finfo(dtype).max
    # Products with the largest numbers overflow even float32, to infinities of both signs.
    value = {"largest": largest, "lowest": -largest, "infinite": math.inf, "not a number": math.nan}[garbage]
    is_padding = torch.arange(63) >= lengths[:, None]
    zeros, filled = (keys.masked_fill(is_padding[:, None, :, None], fill) for fill in (0.0, value))
    scores = visual_scores(query, filled, visual_index, lengths, scale)
    assert torch.equal(scores, visual_scores(query, zeros, visual_index, lengths, scale))
    assert torch.equal(scores.isfinite(), visual_index < lengths[:, None])


def test_padding_gets_no_attention_however_low_the_logits():
    keys = torch.full((1, 2, 5, 2), -1e38)
    keys[:, :, 2:] = 0
    scores = visual_scores(torch.ones(1, 4, 1, 2), keys, torch.tensor([[0, 1]]), torch.tensor([2]), 1.0)
    assert scores.tolist() == [[0.5, 0.5]]


def test_a_row_of_one_token_sees_only_itself():
    query, keys, *_ = scoring_inputs(6, 2, 20, 8, (1, 1), (1, 1))
    scores = visual_scores(query, keys, torch.tensor([[0], [1]]), torch.tensor([1, 1]), 1.0)
    assert scores.tolist() == [[1.0], [-math.inf]]


def test_rows_without_visual_tokens_have_no_scores():
    query, keys, _, lengths, scale = scoring_inputs(4, 2, 20, 8, (20, 7, 1), (0, 0, 0))
    no_token = torch.tensor([[20, 21, 2**63 - 1], [7, 19, 20], [1, 7, 2**63 - 1]])
    scores = visual_scores(query, keys, no_token, lengths, scale)
    assert scores.tolist() == [[-math.inf] * 3] * 3


def non_contiguous():
    query, keys, visual_index, lengths, scale = ragged(seed=1)
    query = query.transpose(1, 3).contiguous().transpose(1, 3)
    keys = keys.transpose(1, 2).contiguous().transpose(1, 2)
    visual_index = visual_index.repeat_interleave(2, dim=1)[:, ::2]
    lengths = lengths.repeat_interleave(2)[::2]
    assert not any(x.is_contiguous() for x in (query, keys, visual_index, lengths))
    return query, keys, visual_index, lengths, scale


def one_index_for_all_batches():
    query, keys, visual_index, _, scale = scoring_inputs(4, 2, 63, 16, (63, 63, 63), (40, 1, 0), seed=2)
    return query, keys, visual_index[:1].expand(3, -1), torch.tensor([50]).expand(3), scale


@pytest.mark.parametrize("inputs", [non_contiguous, one_index_for_all_batches])
def test_strided_inputs_match_float64_loops(inputs):
    inputs = inputs()
    assert_matches_loops(visual_scores_reference(*inputs), *inputs)


OPCHECK_INPUTS = {
    "batch 1": lambda: scoring_inputs(4, 4, 63, 16, (63,), (40,)),
    "batch 1, padded": lambda: scoring_inputs(4, 2, 63, 16, (50,), (40,)),
    "ragged": ragged,
    "one token": lambda: scoring_inputs(4, 1, 63, 16, (63,), (1,)),
    "one row": lambda: scoring_inputs(2, 1, 1, 8, (1,), (1,)),
    "no visual tokens": lambda: scoring_inputs(2, 1, 9, 8, (5, 9), (0, 0)),
    "all rows visual": lambda: scoring_inputs(6, 3, 63, 5, (63, 63), (63, 63)),
    "bfloat16": lambda: ragged(torch.bfloat16),
    "float16": lambda: ragged(torch.float16),
    "non-contiguous": non_contiguous,
    "expanded index": one_index_for_all_batches,
}


@one("0.3 s each")
@pytest.mark.parametrize("inputs", OPCHECK_INPUTS.values(), ids=OPCHECK_INPUTS.keys())
def test_opcheck(inputs):
    opcheck(torch.ops.reroute.visual_scores, inputs())


@pytest.mark.parametrize("inputs", OPCHECK_INPUTS.values(), ids=OPCHECK_INPUTS.keys())
def test_fake_has_the_form_of_the_real_output(inputs):
    *tensors, scale = inputs()
    real = visual_scores(*tensors, scale)
    with FakeTensorMode() as mode:
        fake = visual_scores(*map(mode.from_tensor, tensors), scale)
    assert real.is_contiguous()
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    assert (real.shape, real.dtype) == (tensors[2].shape, torch.float32)


def test_fake_of_symbolic_sizes():
    *tensors, scale = ragged()
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fakes = [mode.from_tensor(x) for x in tensors]
        fake = visual_scores(*fakes, scale)
    assert all(isinstance(size, torch.SymInt) for size in fake.shape)
    assert list(map(str, fake.shape)) == list(map(str, fakes[2].shape))
    assert mode.shape_env.guards == []


@pytest.mark.full("5 s; compiled regions hold it in test_routed_model.py")
def test_compiled_reference_matches_float64_loops():
    backend = CompileCounterWithBackend("inductor")
    compiled = torch.compile(visual_scores_reference, backend=backend, fullgraph=True, dynamic=True)
    for places, lengths, tokens in [(63, (63, 40, 2), (40, 0, 1)), (30, (21, 30), (21, 7))]:
        inputs = scoring_inputs(8, 2, places, 16, lengths, tokens)
        assert_matches_loops(compiled(*inputs), *inputs)
    assert backend.frame_count == 1


def test_inputs_stay_as_they_were():
    inputs = ragged()
    copies = [x.clone() for x in inputs[:4]]
    visual_scores(*inputs)
    assert all(map(torch.equal, inputs[:4], copies))


@pytest.mark.parametrize("length", [1, 63, 500])
def test_equal_keys_share_the_attention_equally(length):
    query = torch.randn(2, 4, 1, 8, generator=torch.Generator().manual_seed(0))
    keys = torch.ones(2, 2, length + 100, 8)
    lengths = torch.tensor([length, length + 100])
    scores = visual_scores(query, keys, torch.arange(length).expand(2, length), lengths, 0.5)
    # All exponentials are exactly 1: one rounding in 1 / length, at most 4 in the mean over heads.
    assert ((scores * lengths[:, None] - 1).abs() <= 6 * EPSILON).all()


def test_text_keys_take_part_in_the_softmax():
    query, keys = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 4, 2)
    keys[0, 0, 3] = math.log(5) / 2
    scores = visual_scores(query, keys, torch.tensor([[0, 1, 2]]), torch.tensor([4]), 1.0)
    # exp(0) / (3 exp(0) + 5), with a few roundings in log 5, the exponential and the division.
    assert scores.tolist() == [pytest.approx([1 / 8] * 3, rel=8 * EPSILON)]


def test_large_logits_do_not_overflow():
    query, keys, visual_index, lengths, _ = scoring_inputs(4, 2, 63, 16, (63,), (63,), dtype=torch.float16)
    scores = visual_scores(query * 1000, keys * 1000, visual_index, lengths, 1.0)
    assert scores.isfinite().all()
    # The 63 scores and the 4 heads are summed with one rounding each.
    assert abs(scores.sum().item() - 1) <= (63 + 4) * EPSILON


@examples(gate=7, full=30, reason="drawn sizes", derandomize=True)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.integers(1, 9),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    data=st.data(),
)
def test_any_shape_matches_float64_loops(kv_heads, group, head_dim, lengths, data):
    tokens = [data.draw(st.integers(0, length)) for length in lengths]
    places = max(lengths) + data.draw(st.integers(0, 3))
    seed = data.draw(st.integers(0, 2**32))
    inputs = scoring_inputs(kv_heads * group, kv_heads, places, head_dim, lengths, tokens, seed=seed)
    scores = visual_scores(*inputs)
    assert_matches_loops(scores, *inputs)
    assert torch.equal(scores >= 0, inputs[2] < inputs[3][:, None])
    assert (scores.clamp(min=0).sum(dim=1) <= 1 + (places + kv_heads * group) * EPSILON).all()


@examples(gate=7, full=30, reason="drawn sizes", derandomize=True)
@given(tokens=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_scores_follow_the_order_of_the_index(tokens, seed):
    query, keys, visual_index, *rest = scoring_inputs(4, 2, 63, 8, (63, 40), (63, tokens), seed=seed)
    order = torch.randperm(63, generator=torch.Generator().manual_seed(seed))
    scores = visual_scores(query, keys, visual_index, *rest)
    assert torch.equal(visual_scores(query, keys, visual_index[:, order], *rest), scores[:, order])
