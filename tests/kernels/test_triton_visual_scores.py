"""`reroute::visual_scores` as Triton kernels, interpreted: as close to float64 as the reference."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_examples import NO_TOKEN, scoring_inputs
from suite_tiers import examples, one, singles
from torch.library import opcheck

from reroute_fx.kernels import visual_scores_reference
from reroute_fx.kernels.visual_scores import triton as kernels

EPSILON = torch.finfo(torch.float32).eps
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MORE_SPLITS = kernels.BLOCK_KEYS * kernels.BLOCK_SPLITS + 100
"""Places of which not all splits are joined at once."""

# heads, key-value heads, places, head dimension, and for each row its length and its visual tokens
SHAPES = (
    (1, 1, 1, 1, (1,), (1,)),
    (2, 2, 70, 1, (70, 3), (40, 2)),
    (2, 1, 130, 33, (130, 64, 65), (66, 64, 1)),
    (7, 1, 63, 40, (63, 1), (40, 1)),
    (4, 4, 65, 80, (64, 65), (10, 0)),
    (14, 2, 200, 128, (200, 1), (129, 0)),
    (40, 4, 70, 16, (70, 9), (17, 5)),
    (4, 2, 64, 100, (64,), (64,)),
    (2, 1, 40, 256, (40, 20), (0, 0)),
    (1, 1, MORE_SPLITS, 2, (MORE_SPLITS, 70), (90, 9)),
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def example(*sizes, **options):
    """Keys lie in memory as a model computes them, ``[B, S, Hkv, D]``."""
    query, keys, *rest = scoring_inputs(*sizes, **options)
    return query, keys.transpose(1, 2).contiguous().transpose(1, 2), *rest


def exact_scores(query, keys, visual_index, lengths, scale):
    """Scores in float64, and how far a float32 evaluation may be from each of them."""
    _, heads, _, head_dim = query.shape
    length = keys.shape[2]
    keys = keys.double().repeat_interleave(heads // keys.shape[1], dim=1)
    is_token = torch.arange(length) < lengths[:, None]
    logits = (query.double() * keys).sum(dim=3) * scale
    magnitudes = (query.double() * keys).abs().sum(dim=3) * abs(scale)
    logits = logits.masked_fill(~is_token[:, None], -math.inf)
    attention = logits.softmax(dim=2).mean(dim=1)

    # A float32 dot product of D terms is off by at most D roundings of the sum of the absolute products, one more
    # for the scale. A logit's error enters the softmax twice: in its own exponential and in the total. Then come
    # the rounding of `logit - peak`, the sums over rows and heads, 8 roundings for the exponential, the division
    # and the mean, and 3 for each split that is joined. A rounding is half an epsilon; counting a whole one leaves
    # a factor of 2. Padding adds exact zeros to the sums.
    spread = logits.amax(dim=2) - logits.masked_fill(~is_token[:, None], math.inf).amin(dim=2)
    magnitude = magnitudes.masked_fill(~is_token[:, None], 0).amax(dim=2)
    splits = length // kernels.BLOCK_KEYS + 1
    roundings = (2 * (head_dim + 1) * magnitude + spread).amax(dim=1) + lengths + heads + 8 + 3 * splits
    # Exponentials below the normal range lose digits; none is off by more than the smallest normal.
    errors = attention * roundings[:, None] * EPSILON + SMALLEST_NORMAL
    place = visual_index.clamp(max=length - 1)
    is_none = visual_index >= lengths[:, None]
    return attention.gather(1, place).masked_fill(is_none, -math.inf), errors.gather(1, place)


def assert_matches_reference(inputs):
    copies = [x.clone() for x in inputs[:4]]
    scores = torch.ops.reroute.visual_scores_triton(*inputs)
    reference = visual_scores_reference(*inputs)
    expected, tolerance = exact_scores(*inputs)
    assert (scores.shape, scores.stride()) == (reference.shape, reference.stride())
    assert scores.dtype is torch.float32
    assert torch.equal(scores == -math.inf, expected == -math.inf)
    is_token = expected > -math.inf
    scores, reference, expected, tolerance = (x[is_token] for x in (scores, reference, expected, tolerance))
    errors, of_reference = ((x.double() - expected).abs() for x in (scores, reference))
    assert (errors <= tolerance).all()
    # Where the reference happens to be exact a few roundings are allowed still.
    allowed = 4 * (of_reference / expected.clamp(min=SMALLEST_NORMAL)).amax() if len(expected) else 0
    assert (errors <= (allowed + 8 * EPSILON) * expected + SMALLEST_NORMAL).all()
    assert all(map(torch.equal, inputs[:4], copies))


@singles("interpreted kernels are slow")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype):
    assert_matches_reference(example(*shape, dtype=dtype))


@one("interpreted kernels are slow")
@pytest.mark.parametrize("keys_at_once", [1, 16, 128])
def test_size_of_a_split(keys_at_once, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK_KEYS", keys_at_once)
    assert_matches_reference(example(4, 2, 70, 8, (70, 33), (50, 30)))


def ragged(dtype=torch.float32, seed=0):
    return example(6, 2, 150, 24, (150, 40, 1, 66), (80, 17, 1, 0), dtype, seed)


@one("interpreted kernels are slow")
@pytest.mark.parametrize("seed", range(3))
def test_splits_behind_the_last_token_don_t_count(seed):
    query, keys, visual_index, lengths, scale = ragged(seed=seed)
    behind = torch.arange(150) >= lengths[:, None]
    worst = keys.masked_fill(behind[:, None, :, None], math.nan)
    scores = torch.ops.reroute.visual_scores_triton(query, worst, visual_index, lengths, scale)
    expected = torch.ops.reroute.visual_scores_triton(query, keys, visual_index, lengths, scale)
    assert not scores.isnan().any()
    assert torch.equal(scores, expected)


def layouts():
    """Keys in other layouts of memory than the models', and the place where they are in them."""
    batch, kv_heads, places, head_dim = 4, 2, 150, 24
    yield "contiguous", lambda keys: keys.contiguous()
    yield "by place", lambda keys: keys.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    yield "by dimension", lambda keys: keys.transpose(2, 3).contiguous().transpose(2, 3)
    yield "of a cache", lambda keys: torch.cat([keys, keys.neg()], dim=2)[:, :, :places]
    yield "of packed projections", lambda keys: torch.cat([keys.neg(), keys, keys.neg()], dim=3)[..., 24:48]
    yield "every other dimension", lambda keys: keys.repeat_interleave(2, dim=3)[..., ::2]
    yield "one of all rows", lambda keys: keys[:1].expand(batch, kv_heads, places, head_dim)
    yield "one of all heads", lambda keys: keys[:, :1].expand(batch, kv_heads, places, head_dim)


@one("interpreted kernels are slow")
@pytest.mark.parametrize("layout", [pytest.param(change, id=name) for name, change in layouts()])
def test_layouts_of_keys(layout):
    query, keys, *rest = ragged(torch.bfloat16)
    changed = layout(keys)
    assert changed.shape == keys.shape
    assert changed.stride() != keys.stride()
    assert_matches_reference((query, changed, *rest))


def test_strided_inputs():
    query, keys, visual_index, lengths, scale = ragged()
    query = query.transpose(1, 3).contiguous().transpose(1, 3)
    visual_index = visual_index.repeat_interleave(2, dim=1)[:, ::2]
    lengths = lengths.repeat_interleave(2)[::2]
    assert not any(x.is_contiguous() for x in (query, keys, visual_index, lengths))
    assert_matches_reference((query, keys, visual_index, lengths, scale))


def test_one_index_for_all_rows():
    query, keys, visual_index, _, scale = example(4, 2, 63, 16, (63, 63, 63), (40, 1, 0), seed=2)
    assert_matches_reference(
        (query, keys, visual_index[:1].expand(3, -1), torch.tensor([50]).expand(3), scale)
    )


def test_no_visual_tokens():
    query, keys, _, lengths, scale = ragged()
    visual_index = torch.zeros(4, 0, dtype=torch.int64)
    scores = torch.ops.reroute.visual_scores_triton(query, keys, visual_index, lengths, scale)
    assert scores.shape == (4, 0)


def test_index_in_any_order_and_again():
    query, keys, _, lengths, scale = ragged()
    visual_index = torch.tensor([[7, NO_TOKEN, 3, 7, 0, 40, 149, 150]]).expand(4, -1)
    assert_matches_reference((query, keys, visual_index, lengths, scale))


@pytest.mark.parametrize("factor", [1e4, -1e4])
def test_large_logits_do_not_overflow(factor):
    query, keys, visual_index, lengths, _ = example(4, 2, 150, 16, (150, 66), (150, 66))
    scores = torch.ops.reroute.visual_scores_triton(query * factor, keys, visual_index, lengths, 1.0)
    is_token = visual_index < lengths[:, None]
    assert scores[is_token].isfinite().all()
    # Each head's attention falls on one token; the scores and the heads are summed with one rounding each.
    assert ((scores.where(is_token, 0).sum(dim=1) - 1).abs() <= (150 + 4) * EPSILON).all()


@pytest.mark.parametrize("length", [1, 63, 200])
def test_equal_keys_share_the_attention_equally(length):
    query = torch.randn(2, 4, 1, 8, generator=torch.Generator().manual_seed(0))
    keys, lengths = torch.ones(2, 2, length + 100, 8), torch.tensor([length, length + 100])
    index = torch.arange(length).expand(2, length)
    scores = torch.ops.reroute.visual_scores_triton(query, keys, index, lengths, 0.5)
    # All exponentials are exactly 1: one rounding in 1 / length, at most 4 in the mean over heads.
    assert ((scores * lengths[:, None] - 1).abs() <= 6 * EPSILON).all()


@examples(gate=6, full=25, reason="drawn sizes", derandomize=True)
@given(
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 2, 7]),
    head_dim=st.integers(1, 40),
    lengths=st.lists(st.integers(1, 140), min_size=1, max_size=2),
    padding=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_any_shape_matches_reference(kv_heads, group, head_dim, lengths, padding, dtype, data):
    tokens = [data.draw(st.integers(0, length)) for length in lengths]
    seed = data.draw(st.integers(0, 2**32))
    places = max(lengths) + padding
    assert_matches_reference(
        example(kv_heads * group, kv_heads, places, head_dim, lengths, tokens, dtype, seed)
    )


def test_schema():
    opcheck(torch.ops.reroute.visual_scores_triton, ragged(), test_utils="test_schema")
