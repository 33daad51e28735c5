"""The search on losses that are known, without a model."""

import pytest

from reroute_fx import AttentionRule, ChanceRule
from reroute_fx.analysis.theory import LayerCost
from reroute_fx.tuning.divergence import Losses
from reroute_fx.tuning.search import FIRST, REST, ROUND, Search
from reroute_fx.tuning.search_space import SearchSpace

SPACE = SearchSpace(
    (LayerCost.dense(192, 4, 4, 512),) * 16, 128, "compact_route_stagewise", (AttentionRule(), ChanceRule())
)
GOOD = {1, 4, 8, 12}


def loss(config):
    """Less the more good layers decide, by attention, and the fewer others."""
    by_attention = {
        layer
        for layer, rule in zip(config.decision_layers, config.rules, strict=True)
        if rule == AttentionRule()
    }
    return 1.0 + 0.1 * len(set(config.decision_layers) - GOOD) - 0.2 * len(by_attention & GOOD)


def searched(seed=0, rounds=4, proposed=()):
    search, jobs = Search(SPACE, proposed, seed), []

    def measure(asked):
        jobs.extend(asked)
        return [Losses((loss(config),), (1.0,)) for config, _ in asked]

    for _ in range(rounds):
        search.next_round(measure)
    return search.trials, jobs


@pytest.fixture(scope="module")
def found():
    return searched(rounds=14)


def test_the_same_seed_tries_the_same_and_another_something_else(found):
    assert searched(rounds=5)[0] == found[0][: 5 * ROUND]
    assert searched(seed=1, rounds=1)[0] != found[0][:ROUND]


def test_what_is_proposed_comes_first():
    point = SPACE.point(SPACE.reference)
    trials, _ = searched(rounds=1, proposed=[point])
    assert trials[0].config == SPACE.config(point)


def test_the_best_third_sees_all_prompts(found):
    trials, jobs = found
    parts = {part: [config for config, each in jobs if each == part] for part in (FIRST, REST)}
    assert parts[FIRST] == [trial.config for trial in trials]
    complete = [trial for trial in trials if trial.is_complete]
    assert parts[REST] == [trial.config for trial in complete]
    assert len(trials) / 5 < len(complete) < len(trials)
    losses = [loss(trial.config) for trial in trials]
    for number, trial in enumerate(trials):
        # Whether the trial counts among its rivals makes a difference of one.
        better = sum(other < losses[number] for other in losses[:number])
        if trial.is_complete:
            assert better < max(1, (number + 2) // 3)
        else:
            assert better >= max(1, (number + 1) // 3)
    assert min(trials, key=lambda trial: trial.divergence).is_complete


def test_what_is_suggested_is_better_than_what_is_drawn(found):
    """By 0.2 of 0.8 between nothing and all that is good."""
    drawn, suggested = found[0][:32], found[0][-32:]
    mean = [sum(trial.divergence for trial in part) / len(part) for part in (drawn, suggested)]
    assert mean[1] < mean[0] - 0.2
