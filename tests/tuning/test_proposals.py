"""Configurations that a profile suggests: they keep the tier, and nothing of the same price covers more."""

from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from suite_tiers import examples

from reroute_fx import ConfigError, RoutingConfig
from reroute_fx.rules import AttentionRule
from reroute_fx.tuning import proposals
from reroute_fx.tuning.proposals import MOST_DECISIONS, SHARES, fit_shares, propose

LAYERS, HEADS = 8, 2


def drawn(seed, layers=LAYERS):
    """Effects and recall curves by chance."""
    random = np.random.default_rng(seed)
    effect = random.dirichlet(np.full(layers, 0.5))
    power = random.uniform(0.1, 3, (2, layers, HEADS + 1, 1))
    last, text = np.array(SHARES) ** power
    return effect, {"last": last, "text": text}


@given(st.integers(0, 1000), st.floats(0.2, 0.9))
@examples(gate=8, full=100, reason="each takes a tenth of a second")
def test_proposals_keep_the_tier(seed, share):
    effect, curves = drawn(seed)
    found = propose(effect, curves, share)
    assert {len(p.config.decision_layers) for p in found} <= set(range(1, MOST_DECISIONS + 1))
    assert found == sorted(found, key=lambda p: -round(p.coverage, 6))
    assert any(not p.config.rules for p in found)
    for proposal in found:
        # One token more or less of 576 in the longest stage.
        assert abs(proposal.config.average_tokens(LAYERS) - 576 * share) <= 1
        assert 0 <= proposal.coverage <= 1 + 1e-9
        proposal.config.check_depth(LAYERS)
        assert all(rule.layer in ("own", "previous") for rule in proposal.config.rules)


def test_a_layer_that_finds_everything_decides_by_the_rule_that_does():
    """Pictures are read in layers 0 and 4. Head 1 of layer 3 finds the targets, nothing else does."""
    effect = np.zeros(LAYERS)
    effect[[0, 4]] = 0.5
    curves = {by: np.zeros((LAYERS, HEADS + 1, len(SHARES))) for by in ("last", "text")}
    for table in curves.values():
        table[..., -1] = 1
    curves["text"][3, 1] = 1
    best = propose(effect, curves, 0.2)[0]
    assert best.coverage == pytest.approx(1)
    decisions = dict(zip(best.config.decision_layers, best.config.rules, strict=True))
    before = {3: AttentionRule("own", (1,), "text"), 4: AttentionRule("previous", (1,), "text")}
    assert any(decisions.get(layer) == rule for layer, rule in before.items())
    plain = next(p for p in propose(effect, curves, 0.2) if not p.config.rules)
    assert plain.coverage == pytest.approx(0.5)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("price", [0.0, 0.05, 0.3])
def test_a_path_is_the_best_of_all(count, price, monkeypatch):
    monkeypatch.setattr(proposals, "SHARES", (0.05, 0.2, 0.5, 1.0))
    random = np.random.default_rng(count)
    effect, recall = random.dirichlet(np.ones(6)), np.sort(random.random((6, 4)), axis=1)
    recall[0] = 0

    def worth(stages):
        ends = [layer for layer, _ in stages[1:]] + [6]
        first = stages[0][0]
        total = effect[:first].sum() - price * first
        for (layer, kept), end in zip(stages, ends, strict=True):
            cost = price * proposals.SHARES[kept] * (end - layer)
            total += effect[layer:end].sum() * recall[layer, kept] - cost
        return total

    paths = (
        list(zip(layers, kept, strict=True))
        for layers in combinations(range(1, 6), count)
        for kept in product(range(4), repeat=count)
    )
    found = proposals._path(effect, recall, count, price)
    assert len(found) == count
    assert worth(found) == pytest.approx(max(map(worth, paths)))


def test_coverage_is_what_is_read_times_what_is_found():
    effect, curves = drawn(5)
    for proposal in propose(effect, curves, 0.4):
        config, recalled = proposal.config, np.ones(LAYERS)
        rules = config.rules or (AttentionRule(),) * len(config.decision_layers)
        for layer, ratio, rule in zip(config.decision_layers, config.keep_ratios, rules, strict=True):
            table = curves[rule.queries][layer - (rule.layer == "previous")]
            curve = table[rule.heads[0] if rule.heads else -1]
            recalled[layer:] = np.interp(np.log(ratio), np.log(SHARES), curve)
        assert proposal.coverage == pytest.approx((effect * recalled).sum())


def test_a_tier_out_of_reach_is_refused():
    effect, curves = drawn(0)
    with pytest.raises(ConfigError, match=r"keeps 0.111 of the visual tokens, but in 8 layers"):
        propose(effect, curves, 1 / 9)


def test_shares_are_scaled_as_one():
    fitted = fit_shares(RoutingConfig((1, 4, 8, 12), (1, 1, 0.5, 0.25)), 2 / 9, 16)
    assert abs(fitted.average_tokens(16) - 128) < 0.5
    first, second, third, last = fitted.keep_ratios
    assert (first, second) == (pytest.approx(2 * third), pytest.approx(4 * last))
    assert replace(fitted, keep_ratios=(1, 1, 0.5, 0.25)) == RoutingConfig((1, 4, 8, 12), (1, 1, 0.5, 0.25))
