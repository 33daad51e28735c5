"""`reroute::attention_with_softcap`: against its formula, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from reroute_fx.kernels import attention_with_softcap, soft_cap

# heads, key-value heads, head dimension, queries, keys
SHAPES = ((4, 4, 8, 9, 9), (8, 2, 16, 1, 30), (6, 3, 5, 7, 7))
KINDS = ("causal", "mask", "everything")
CAP = 1.5


def arguments(shape, kind, dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    heads, kv_heads, width, queries, keys = shape

    def draw(*size):
        return torch.randn(size, generator=random, dtype=torch.float64).to(dtype)

    mask = torch.rand(2, 1, queries, keys, generator=random) > 0.3 if kind == "mask" else None
    tensors = draw(2, heads, queries, width), draw(2, kv_heads, keys, width), draw(2, kv_heads, keys, width)
    return *tensors, CAP, mask, kind == "causal", 1.0


def by_definition(query, key, value, softcap, mask, is_causal, scale):
    query, key, value = (tensor.double() for tensor in (query, key, value))
    times = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(times, 1).mT * scale
    logits = softcap * (logits / softcap).tanh()
    if is_causal:
        logits = logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    return logits.softmax(-1) @ value.repeat_interleave(times, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "kind"), [(s, k) for s in SHAPES for k in KINDS if k != "causal" or s[3] == s[4]]
)
def test_it_is_a_softmax_of_capped_logits(shape, kind, dtype):
    given = arguments(shape, kind, dtype)
    result = attention_with_softcap(*given)
    assert result.is_contiguous()
    assert result.dtype is dtype
    # Products and maps are rounded to the dtype, softmax and values of some units are not.
    assert (result - by_definition(*given)).abs().max() < 16 * torch.finfo(dtype).eps


def test_a_high_cap_is_plain_attention_and_a_low_one_an_average():
    query, key, value, *_ = arguments(SHAPES[0], "everything")
    free = F.scaled_dot_product_attention(query, key, value, scale=1.0)
    capped = [attention_with_softcap(query, key, value, cap, None, False, 1.0) for cap in (1e4, 1e-6)]
    torch.testing.assert_close(capped[0], free, atol=1e-5, rtol=0)
    torch.testing.assert_close(capped[1], value.mean(2, keepdim=True).expand_as(value), atol=1e-5, rtol=0)


def test_a_row_that_sees_nothing_is_no_nan():
    given = list(arguments(SHAPES[0], "mask"))
    given[4] = torch.zeros_like(given[4])
    assert attention_with_softcap(*given).isfinite().all()


def test_without_a_cap_logits_stay_as_they_are():
    logits = torch.randn(3)
    assert soft_cap(logits, None) is logits


@pytest.mark.parametrize("kind", KINDS)
def test_schema_and_fake_implementation(kind):
    opcheck(attention_with_softcap, arguments(SHAPES[0], kind))
