"""`reroute::attention_with_sinks`: against the softmax with one more column, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from reroute_fx.kernels import attention_with_sinks, with_sink_token

# heads, key-value heads, head dimension, queries, keys
SHAPES = ((4, 4, 8, 9, 9), (8, 2, 16, 1, 30), (6, 3, 5, 7, 7), (2, 1, 64, 3, 12))
KINDS = ("causal", "mask", "everything")


def arguments(shape, kind, dtype=torch.float64, seed=0):
    random = torch.Generator().manual_seed(seed)
    heads, kv_heads, width, queries, keys = shape

    def draw(*size):
        return torch.randn(size, generator=random, dtype=torch.float64).to(dtype)

    mask = torch.rand(2, 1, queries, keys, generator=random) > 0.3 if kind == "mask" else None
    tensors = draw(2, heads, queries, width), draw(2, kv_heads, keys, width), draw(2, kv_heads, keys, width)
    return *tensors, 2 * draw(heads), mask, kind == "causal", 0.3


def by_definition(query, key, value, sinks, mask, is_causal, scale):
    query, key, value, sinks = (tensor.double() for tensor in (query, key, value, sinks))
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    logits = query @ key.mT * scale
    if is_causal:
        logits = logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    column = sinks[None, :, None, None].expand(*logits.shape[:3], 1)
    return torch.cat([logits, column], dim=-1).softmax(-1)[..., :-1] @ value


def cases():
    for shape in SHAPES:
        for kind in KINDS:
            if kind != "causal" or shape[3] == shape[4]:
                yield pytest.param(shape, kind, id=f"{kind}-{'-'.join(map(str, shape))}")


@pytest.mark.parametrize(("shape", "kind"), cases())
def test_it_is_a_softmax_with_one_more_column(shape, kind):
    given = arguments(shape, kind)
    result = attention_with_sinks(*given)
    assert result.is_contiguous()
    assert (result - by_definition(*given)).abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    given = arguments(SHAPES[1], "mask", dtype)
    result = attention_with_sinks(*given)
    assert result.dtype is dtype
    # A sink is rounded once more than the values are, which lie near 1.
    assert (result - by_definition(*given)).abs().max() < 8 * torch.finfo(dtype).eps


def test_a_sink_takes_its_share():
    """With equal logits everywhere a token sees k others and the sink: it gets k / (k + 1) of the mean value."""
    value = torch.ones(1, 1, 5, 8)
    zeros = torch.zeros_like(value)
    result = attention_with_sinks(zeros, zeros, value, torch.zeros(1), None, True, 1.0)
    expected = torch.tensor([k / (k + 1) for k in range(1, 6)])
    torch.testing.assert_close(result[0, 0, :, 0], expected)


def test_without_weight_it_is_plain_attention():
    query, key, value, sinks, *rest = arguments(SHAPES[0], "causal")
    result = attention_with_sinks(query, key, value, torch.full_like(sinks, -1e4), *rest)
    assert (
        result - F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3)
    ).abs().max() < 1e-14


def test_the_token_in_front_has_the_sink_for_a_logit():
    query, key, _, sinks, *_ = arguments(SHAPES[1], "everything")
    wider, longer = with_sink_token(query, key, sinks, 0.3)
    logits = wider @ longer.repeat_interleave(4, 1).mT * 0.3
    torch.testing.assert_close(logits[..., 0], sinks[None, :, None].expand(2, 8, 1))
    torch.testing.assert_close(logits[..., 1:], query @ key.repeat_interleave(4, 1).mT * 0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_schema_and_fake_implementation(kind):
    opcheck(attention_with_sinks, arguments(SHAPES[0], kind, torch.float32))
