"""`reroute::causal_convolution`: against its formula, in float64."""

import pytest
import torch
from torch.library import opcheck

from reroute_fx.kernels import causal_convolution


def arguments(places, width, dtype=torch.float64, with_state=True, with_lengths=True):
    random = torch.Generator().manual_seed(places)

    def draw(*size):
        return torch.randn(size, generator=random, dtype=torch.float64).to(dtype)

    state = draw(3, 5, width - 1) if with_state else None
    lengths = torch.tensor([places, max(1, places - 2), 1]) if with_lengths else None
    return draw(3, 5, places), draw(5, width), draw(5), state, lengths


def by_definition(inputs, weight, bias, state, lengths):
    """Results of each row's own tokens, and its state."""
    before = weight.shape[1] - 1
    rows = []
    for i, row in enumerate(inputs):
        end = inputs.shape[2] if lengths is None else int(lengths[i])
        earlier = torch.zeros(5, before, dtype=row.dtype) if state is None else state[i]
        seen = torch.cat([earlier, row[:, :end]], dim=1)
        found = [(seen[:, t : t + before + 1] * weight).sum(1) + bias for t in range(end)]
        rows.append((torch.stack(found, dim=1), seen[:, seen.shape[1] - before :]))
    return rows


@pytest.mark.parametrize("places", [1, 2, 7])
@pytest.mark.parametrize("width", [1, 3, 4])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("with_lengths", [True, False])
def test_it_sees_a_few_tokens_before(places, width, with_state, with_lengths):
    given = arguments(places, width, with_state=with_state, with_lengths=with_lengths)
    results, states = causal_convolution(*given)
    assert results.is_contiguous()
    assert states.is_contiguous()
    for found, state, (expected, kept) in zip(results, states, by_definition(*given), strict=True):
        assert (found[:, : expected.shape[1]] - expected).abs().max() < 1e-12
        assert torch.equal(state, kept)


def test_a_sequence_may_come_in_parts():
    inputs, weight, bias, state, _ = arguments(9, 4)
    whole, last = causal_convolution(inputs, weight, bias, state)
    first, between = causal_convolution(inputs[:, :, :4], weight, bias, state)
    second, end = causal_convolution(inputs[:, :, 4:], weight, bias, between)
    assert (torch.cat([first, second], dim=2) - whole).abs().max() < 1e-12
    assert torch.equal(end, last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_is_well_formed(dtype):
    opcheck(torch.ops.reroute.causal_convolution.default, arguments(6, 3, dtype))
    opcheck(torch.ops.reroute.causal_convolution.default, arguments(6, 3, dtype, False, False)[:3])
