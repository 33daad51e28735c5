"""`reroute::visual_scores`: against float64 loops; schema, fake implementation and properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from reroute_fx.kernels import visual_scores, visual_scores_reference

EPSILON = torch.finfo(torch.float32).eps
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# batch, heads, key-value heads, rows, head dimension, visual tokens
SHAPES = (
    (1, 4, 4, 63, 16, 40),
    (3, 8, 2, 500, 32, 333),
    (1, 2, 1, 1, 8, 1),
    (2, 6, 3, 63, 5, 63),
    (3, 4, 1, 129, 64, 1),
)


def example(batch, heads, kv_heads, rows, head_dim, tokens, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, 1, head_dim, generator=generator).to(dtype)
    keys = torch.randn(batch, kv_heads, rows, head_dim, generator=generator).to(dtype)
    index = [torch.randperm(rows, generator=generator)[:tokens].sort().values for _ in range(batch)]
    return query, keys, torch.stack(index), head_dim**-0.5


def scores_by_loops(query, keys, visual_index, scale):
    """Scores in float64, and how far a float32 evaluation may be from each of them."""
    rows, head_dim, heads = keys.shape[2], keys.shape[3], query.shape[1]
    all_scores, all_errors = [], []
    batches = zip(query.double().tolist(), keys.double().tolist(), visual_index.tolist(), strict=True)
    for query_heads, key_heads, index in batches:
        group = len(query_heads) // len(key_heads)
        attention = [0.0] * rows
        relative_error = 0.0
        for head, (vector,) in enumerate(query_heads):
            products = [[a * b for a, b in zip(vector, key, strict=True)] for key in key_heads[head // group]]
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
            # epsilon; counting a whole one leaves a factor of 2.
            logit_error = (head_dim + 1) * magnitude
            relative_error = max(relative_error, 2 * logit_error + peak - min(logits) + rows + heads + 8)
        all_scores.append([attention[row] for row in index])
        # Exponentials below the normal range lose digits; none is off by more than the smallest normal.
        all_errors.append([attention[row] * relative_error * EPSILON + SMALLEST_NORMAL for row in index])
    return torch.tensor(all_scores, dtype=torch.float64), torch.tensor(all_errors, dtype=torch.float64)


def assert_matches_loops(scores, query, keys, visual_index, scale):
    expected, tolerance = scores_by_loops(query, keys, visual_index, scale)
    # A bound as wide as a bfloat16 rounding would let 16-bit arithmetic pass.
    assert (tolerance / expected).max() < torch.finfo(torch.bfloat16).eps / 2
    assert ((scores.double() - expected).abs() <= tolerance).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64_loops(shape, dtype):
    inputs = example(*shape, dtype=dtype)
    assert_matches_loops(visual_scores_reference(*inputs), *inputs)


def test_operator_runs_the_reference():
    inputs = example(3, 8, 2, 63, 16, 40)
    assert torch.equal(visual_scores(*inputs), visual_scores_reference(*inputs))
    assert torch.equal(torch.ops.reroute.visual_scores(*inputs), visual_scores_reference(*inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_computes_in_float32_whatever_the_inputs(dtype):
    query, keys, visual_index, scale = example(1, 4, 2, 63, 16, 40, dtype=dtype)
    in_half = visual_scores(query, keys, visual_index, scale)
    in_single = visual_scores(query.float(), keys.float(), visual_index, scale)
    assert in_half.dtype is torch.float32
    assert torch.equal(in_half, in_single)


def non_contiguous():
    query, keys, visual_index, scale = example(3, 8, 2, 63, 16, 40, seed=1)
    query = query.transpose(1, 3).contiguous().transpose(1, 3)
    keys = keys.transpose(1, 2).contiguous().transpose(1, 2)
    visual_index = visual_index.repeat_interleave(2, dim=1)[:, ::2]
    assert not any(x.is_contiguous() for x in (query, keys, visual_index))
    return query, keys, visual_index, scale


def one_index_for_all_batches():
    query, keys, visual_index, scale = example(3, 4, 2, 63, 16, 40, seed=2)
    return query, keys, visual_index[:1].expand(3, -1), scale


@pytest.mark.parametrize("inputs", [non_contiguous, one_index_for_all_batches])
def test_strided_inputs_match_float64_loops(inputs):
    inputs = inputs()
    assert_matches_loops(visual_scores_reference(*inputs), *inputs)


OPCHECK_INPUTS = {
    "batch 1": lambda: example(1, 4, 4, 63, 16, 40),
    "batch 3, grouped heads": lambda: example(3, 8, 2, 63, 16, 40),
    "one token": lambda: example(1, 4, 1, 63, 16, 1),
    "one row": lambda: example(1, 2, 1, 1, 8, 1),
    "all rows visual": lambda: example(2, 6, 3, 63, 5, 63),
    "bfloat16": lambda: example(1, 4, 2, 63, 16, 40, dtype=torch.bfloat16),
    "float16": lambda: example(3, 4, 2, 63, 16, 40, dtype=torch.float16),
    "non-contiguous": non_contiguous,
    "expanded index": one_index_for_all_batches,
}


@pytest.mark.parametrize("inputs", OPCHECK_INPUTS.values(), ids=OPCHECK_INPUTS.keys())
def test_opcheck(inputs):
    opcheck(torch.ops.reroute.visual_scores, inputs())


@pytest.mark.parametrize("inputs", OPCHECK_INPUTS.values(), ids=OPCHECK_INPUTS.keys())
def test_fake_has_the_form_of_the_real_output(inputs):
    query, keys, visual_index, scale = inputs()
    real = visual_scores(query, keys, visual_index, scale)
    with FakeTensorMode() as mode:
        fake = visual_scores(*map(mode.from_tensor, (query, keys, visual_index)), scale)
    assert real.is_contiguous()
    assert fake.is_contiguous()
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
    assert (real.shape, real.dtype) == (visual_index.shape, torch.float32)


def test_inputs_stay_as_they_were():
    inputs = example(3, 8, 2, 63, 16, 40)
    copies = [x.clone() for x in inputs[:3]]
    visual_scores(*inputs)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs[:3], copies, strict=True))


@pytest.mark.parametrize("rows", [1, 63, 500])
def test_equal_keys_share_the_attention_equally(rows):
    query = torch.randn(2, 4, 1, 8, generator=torch.Generator().manual_seed(0))
    keys = torch.ones(2, 2, rows, 8)
    scores = visual_scores(query, keys, torch.arange(rows).expand(2, rows), 0.5)
    # All exponentials are exactly 1: one rounding in 1 / rows, at most 4 in the mean over heads.
    assert (scores - 1 / rows).abs().max() <= 5 * EPSILON / rows


def test_text_keys_take_part_in_the_softmax():
    query, keys = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 4, 2)
    keys[0, 0, 3] = math.log(5) / 2
    scores = visual_scores(query, keys, torch.tensor([[0, 1, 2]]), 1.0)
    # exp(0) / (3 exp(0) + 5), with a few roundings in log 5, the exponential and the division.
    assert scores.tolist() == [pytest.approx([1 / 8] * 3, rel=8 * EPSILON)]


def test_large_logits_do_not_overflow():
    query, keys, visual_index, _ = example(1, 4, 2, 63, 16, 63, dtype=torch.float16)
    scores = visual_scores(query * 1000, keys * 1000, visual_index, 1.0)
    assert scores.isfinite().all()
    # The 63 scores and the 4 heads are summed with one rounding each.
    assert abs(scores.sum().item() - 1) <= (63 + 4) * EPSILON


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    rows=st.integers(1, 20),
    head_dim=st.integers(1, 9),
    data=st.data(),
)
def test_any_shape_matches_float64_loops(batch, kv_heads, group, rows, head_dim, data):
    tokens = data.draw(st.integers(1, rows))
    seed = data.draw(st.integers(0, 2**32))
    inputs = example(batch, kv_heads * group, kv_heads, rows, head_dim, tokens, seed=seed)
    scores = visual_scores(*inputs)
    assert_matches_loops(scores, *inputs)
    assert (scores >= 0).all()
    assert (scores.sum(dim=1) <= 1 + (rows + kv_heads * group) * EPSILON).all()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(tokens=st.integers(1, 63), seed=st.integers(0, 2**32))
def test_scores_follow_the_order_of_the_index(tokens, seed):
    query, keys, visual_index, scale = example(2, 4, 2, 63, 8, tokens, seed=seed)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    scores = visual_scores(query, keys, visual_index, scale)
    assert torch.equal(visual_scores(query, keys, visual_index[:, order], scale), scores[:, order])
