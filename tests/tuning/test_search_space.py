"""The space of a search: every point that is a configuration costs what the tier does."""

import random
from dataclasses import replace

import optuna
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from suite_tiers import examples

from reroute_fx import AttentionRule, ChanceRule, ConfigError, RoutingConfig
from reroute_fx.analysis.theory import LayerCost, prefill_cost
from reroute_fx.methods.tiers import REFERENCE_TOKENS
from reroute_fx.tuning.search_space import LEAST_WEIGHT, MOST_DECISIONS, Decision, SearchSpace

RULES = (AttentionRule(), AttentionRule(layer="previous"), ChanceRule())
SEVEN_B = LayerCost.dense(4096, 32, 32, 11008)
SMALL = LayerCost.dense(192, 4, 4, 512)


def space(tier=128, layers=16, cost=SMALL, action="compact_route_stagewise", rules=RULES):
    return SearchSpace((cost,) * layers, tier, action, rules)


@examples(gate=40, full=1000, reason="each solves for a tier, 20 ms")
@given(
    layers=st.sampled_from([12, 16, 28, 32]),
    cost=st.sampled_from([SMALL, SEVEN_B]),
    tier=st.sampled_from([192, 128, 64, 0.4]),
    action=st.sampled_from(["physical_delete", "compact_route_stagewise"]),
    seed=st.integers(0, 1000),
)
@example(layers=32, cost=SMALL, tier=64, action="physical_delete", seed=223)
def test_what_is_drawn_costs_what_the_tier_does(layers, cost, tier, action, seed):
    here = space(tier, layers, cost, action)
    config = here.config(here.draw(random.Random(seed)))
    exact = RoutingConfig.from_tier(tier, action=action, num_layers=layers)
    # With a token more in every stage.
    ratios = tuple(min(1.0, (count + 1.5) / REFERENCE_TOKENS) for count in config.keep_counts())
    more = replace(config, keep_ratios=ratios)
    tokens = [each.average_tokens(layers) for each in (config, exact, more)]
    costs = [prefill_cost(here.layers, each).flops for each in (config, exact, more)]
    assert tokens[0] <= tokens[1]
    assert 0.99 <= costs[0] / costs[1] <= 1.01
    # As many as one of them allows.
    assert tokens[2] > tokens[1] or costs[2] / costs[1] > 1.01
    assert config.action == action
    assert 1 <= len(config.decision_layers) <= MOST_DECISIONS
    assert set(config.rules) <= set(RULES)


def test_the_exact_schedule_of_the_tier_is_in_it():
    here = space()
    config = here.config(here.point(here.reference))
    assert config.keep_counts() == here.reference.keep_counts()
    assert config.decision_layers == here.reference.decision_layers
    assert config.rules == (AttentionRule(),) * 4


def test_a_trial_suggests_the_point_whose_parameters_it_is_given():
    here = space()
    point = here.draw(random.Random(3))
    study = optuna.create_study()
    study.enqueue_trial(here.parameters(point))
    assert here.suggest(study.ask()) == point


@pytest.mark.parametrize(
    "layers",
    [
        pytest.param([], id="none"),
        pytest.param([4, 8], id="all tokens run too far"),
        pytest.param(range(1, 8), id="too many"),
    ],
)
def test_points_beyond_the_tier_are_none(layers):
    assert space().config(tuple(Decision(layer, 1.0, 0) for layer in layers)) is None


def test_points_that_cost_less_are_none():
    """Ranking by chance costs nothing: with four such decisions a 7B saves more than 1 %."""
    here = space(layers=32, cost=SEVEN_B)
    at = here.point(here.reference)
    assert here.config(at) is not None
    assert here.config(tuple(Decision(each.layer, each.weight, 2) for each in at)) is None


def test_simpler_has_fewer_decisions_and_then_plainer_rules():
    here = space()

    def complexity(layers, *rules):
        ratios = (0.5,) * len(layers)
        return here.complexity(RoutingConfig(layers, ratios, method="rules", rules=[RULES[i] for i in rules]))

    order = [
        complexity((2,), 2),
        complexity((1, 4), 0, 0),
        complexity((1, 4), 1, 1),
        complexity((1, 4), 0, 1),
        complexity((1, 4), 0, 2),
        complexity((1, 4, 8), 0, 0, 0),
    ]
    assert order == sorted(order)


def test_a_tier_that_no_point_reaches_is_named():
    # Two layers: either layer 1 decides, or none does.
    here = space(tier=0.999, layers=2)
    with pytest.raises(ConfigError, match=r"tier asks for 575\.4 of 576 visual tokens on average"):
        here.draw(random.Random(0))


def test_weights_of_a_configuration_stay_in_the_space():
    here = space()
    shares = RoutingConfig((1, 4), (1.0, 0.001))
    assert [each.weight for each in here.point(shares)] == [1.0, LEAST_WEIGHT]
