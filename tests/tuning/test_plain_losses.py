"""The loop that studies of many searches measure with, against the routed model that a search measures with."""

from dataclasses import replace

import pytest
from plain_losses import PlainLosses

import reroute_fx
from reroute_fx import AttentionRule, ChanceRule, LatticeRule, RoutingConfig, UnionRule, ValueRule
from reroute_fx.loading.models_by_name import DEMO, load_model
from reroute_fx.tuning.divergence import Router, answer
from reroute_fx.tuning.read_prompts import demo_prompts, read_prompts
from reroute_fx.tuning.targets import find_targets
from reroute_fx.tuning.watched_model import WatchedModel

TEXT = AttentionRule("previous", queries="text")
CONFIGS = [
    RoutingConfig((1, 4, 8, 12), (0.3, 0.6, 0.2, 0.1)),
    RoutingConfig(
        (2, 5, 9),
        (0.4, 0.1, 0.3),
        method="rules",
        rules=(UnionRule(LatticeRule(), AttentionRule(heads=(2, 0)), 0.4), TEXT, ValueRule("previous")),
    ),
    RoutingConfig(
        (1, 3, 7, 13),
        (0.2, 0.5, 0.4, 0.05),
        method="rules",
        rules=(
            ChanceRule(),
            AttentionRule(queries="text", rotary=False, among="visual"),
            LatticeRule(shift=(1, 2)),
            AttentionRule(rotary=False, heads=(1,)),
        ),
    ),
]


@pytest.mark.full("20 s; it is no product code")
@pytest.mark.usefixtures("one_thread")
def test_the_loop_loses_what_the_routed_model_does():
    loaded = load_model(DEMO, "cpu", "float32")
    batches = read_prompts(loaded.model, demo_prompts(8), loaded.processor, rows=4)
    unrouted = reroute_fx.compile(loaded.model, method="none", backend="eager")
    watched = WatchedModel(loaded.model)
    answered = [
        replace(answer(unrouted, batch, 16), targets=find_targets(watched, batch, 16)) for batch in batches
    ]
    router, plain = Router(loaded.model, unrouted), PlainLosses(loaded.model)
    for config in CONFIGS:
        expected, found = router.losses(config, answered), plain.losses(config, answered)
        assert found.divergence == pytest.approx(expected.divergence, abs=1e-4)
        assert found.agreement == pytest.approx(expected.agreement)
        assert found.missed == pytest.approx(expected.missed)
        assert max(found.divergence) > 0.01
        assert max(found.missed) > 0.01
        selected = router.routed(config)(**answered[1].inputs, use_cache=True).routing.selected
        kept = plain.kept(config, answered[1])
        assert list(kept) == list(selected)
        for layer, rows in selected.items():
            assert kept[layer].tolist() == [row.tolist() for row in rows]
