"""Chance: spread evenly, different for each seed and decision, the same for each call and row."""

import dataclasses

import pytest
import torch
from conversations import SINGLE, batch, unrouted_model

import reroute_fx
from reroute_fx import ChanceRule, RoutingConfig
from reroute_fx.passes import Candidates

PLACES = 4096


def numbers(seed, layer, places=None):
    places = torch.arange(35, 35 + PLACES) if places is None else places
    fields = dict.fromkeys(field.name for field in dataclasses.fields(Candidates))
    given = Candidates(**fields | {"visual_index": places[None], "layer": layer, "seed": seed})
    return ChanceRule()(given)[0] / 2**24


def test_numbers_are_spread_evenly_and_independent():
    # Standard errors: of a mean 1 / sqrt(12 n), of a correlation 1 / sqrt(n).
    columns = torch.stack([numbers(seed, layer) for seed in range(8) for layer in (2, 3, 7)])
    assert ((columns.mean(dim=1) - 0.5).abs() < 4.5 / (12 * PLACES) ** 0.5).all()
    histogram = torch.stack([column.histc(16, 0, 1) for column in columns])
    assert ((histogram - PLACES / 16).abs() < 5 * (PLACES / 16) ** 0.5).all()
    assert torch.corrcoef(columns).fill_diagonal_(0).abs().max() < 5 / PLACES**0.5
    for column in columns:
        neighbours = torch.corrcoef(torch.stack([column[1:], column[:-1]]))[0, 1]
        assert neighbours.abs() < 5 / PLACES**0.5


def test_any_seed_and_place_has_a_number():
    ends = numbers(2**31 - 1, 80, torch.tensor([0, 2**24, 2**63 - 1]))
    assert ((ends >= 0) & (ends < 1)).all()


@torch.no_grad()
def test_the_same_for_each_call_and_another_for_each_seed():
    inputs = batch("llava", *SINGLE)

    def selected(seed):
        config = RoutingConfig((1, 2), (0.5, 0.5), method="random", seed=seed)
        routed = reroute_fx.compile(unrouted_model("llava"), config=config, backend="eager")
        first, second = (routed(**inputs).routing.selected for _ in range(2))
        for layer in (1, 2):
            assert torch.equal(first[layer][0], second[layer][0])
        return [first[layer][0].tolist() for layer in (1, 2)]

    sets = [selected(seed) for seed in range(4)]
    assert len({str(each) for each in sets}) == 4
    assert all(first != second for first, second in sets)


@pytest.mark.parametrize("seed", [-1, 2**31, 0.5, True])
def test_other_seeds_are_refused(seed):
    with pytest.raises(reroute_fx.ConfigError, match="seed is"):
        RoutingConfig((1,), (0.5,), method="random", seed=seed)
