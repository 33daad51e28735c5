"""`reroute::gated_delta`: chunks against steps in float64, and steps against the recurrence in plain loops."""

import pytest
import torch
from torch.library import opcheck

from reroute_fx.kernels import gated_delta, gated_delta_reference


def arguments(places, dtype=torch.float64, with_state=True, with_lengths=True):
    """Two heads of queries and keys for four of values; gates from open to closed."""
    random = torch.Generator().manual_seed(places)

    def draw(*size):
        return torch.randn(size, generator=random, dtype=torch.float64).to(dtype)

    query, key, value = draw(2, places, 2, 6), draw(2, places, 2, 6), draw(2, places, 4, 5)
    decay, beta = -3 * draw(2, places, 4).abs(), draw(2, places, 4).sigmoid()
    state = draw(2, 4, 6, 5) if with_state else None
    return (
        query,
        key,
        value,
        decay,
        beta,
        state,
        torch.tensor([places, max(1, places - 3)]) if with_lengths else None,
    )


def in_loops(query, key, value, decay, beta, state, lengths):
    """Results of each row's own tokens, and its state, head by head."""
    rows = []
    for i in range(len(value)):
        end, heads = value.shape[1] if lengths is None else int(lengths[i]), []
        for head in range(value.shape[2]):
            memory = torch.zeros(6, 5, dtype=torch.float64) if state is None else state[i, head].double()
            found = []
            for t in range(end):
                q, k = (x[i, t, head // 2].double() for x in (query, key))
                q, k = (x / (x.square().sum() + 1e-6).sqrt() for x in (q, k))
                memory = memory * decay[i, t, head].double().exp()
                error = value[i, t, head].double() - k @ memory
                memory = memory + beta[i, t, head].double() * torch.outer(k, error)
                found.append(q @ memory / 6**0.5)
            heads.append((torch.stack(found), memory))
        rows.append(
            (torch.stack([each for each, _ in heads], dim=1), torch.stack([each for _, each in heads]))
        )
    return rows


@pytest.mark.parametrize("operator", [gated_delta, gated_delta_reference], ids=["chunks", "steps"])
@pytest.mark.parametrize("places", [1, 5, 64, 70])
@pytest.mark.parametrize(("with_state", "with_lengths"), [(True, True), (False, False)])
def test_it_writes_what_the_state_lacks(operator, places, with_state, with_lengths):
    given = arguments(places, with_state=with_state, with_lengths=with_lengths)
    results, states = operator(*given)
    for found, state, (expected, memory) in zip(results, states, in_loops(*given), strict=True):
        assert (found[: len(expected)] - expected).abs().max() < 1e-12
        assert (state - memory).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_in_float32(dtype):
    given = arguments(70, dtype)
    results, states = gated_delta(*given)
    assert results.is_contiguous()
    assert states.is_contiguous()
    assert (results.dtype, states.dtype) == (dtype, torch.float32)
    noise = 64 * torch.finfo(torch.float32).eps
    for found, state, (expected, memory) in zip(results, states, in_loops(*given), strict=True):
        largest = max(memory.abs().max(), expected.abs().max())
        off = (found[: len(expected)] - expected).abs().max()
        assert off < (noise + torch.finfo(dtype).eps) * largest
        assert (state - memory).abs().max() < noise * largest


def test_a_sequence_may_come_in_parts():
    *tokens, state, _ = arguments(90)
    whole, last = gated_delta(*tokens, state)
    first, between = gated_delta(*(each[:, :37] for each in tokens), state)
    second, end = gated_delta(*(each[:, 37:] for each in tokens), between)
    assert (torch.cat([first, second], dim=1) - whole).abs().max() < 1e-12
    assert (end - last).abs().max() < 1e-12


def test_operator_is_well_formed():
    opcheck(torch.ops.reroute.gated_delta.default, arguments(9, torch.float32))
    opcheck(torch.ops.reroute.gated_delta.default, arguments(9, torch.float32)[:5])
