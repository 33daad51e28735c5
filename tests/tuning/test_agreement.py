"""Whether a routed model keeps what answers depend on, counted by hand."""

import pytest
import torch
from tiny_models import PAD, collate, llava_config, llava_image, make_row, sharp
from transformers import LlavaForConditionalGeneration

import reroute_fx
from reroute_fx import ConfigError, InputError, RoutingConfig
from reroute_fx.tuning.agreement import agreement, stage_agreement
from reroute_fx.tuning.proposals import SHARES

LAYERS = 4
TARGETS = ((0, 3, 5, 15), (2, 31))
WEIGHTS = [4.0, 0.0, 1.0, 3.0]


@pytest.fixture(scope="module")
def model():
    return sharp(LlavaForConditionalGeneration, llava_config(LAYERS, pad_token_id=PAD))


@pytest.fixture(scope="module")
def inputs(model):
    random = torch.Generator().manual_seed(0)
    images = [[llava_image(random)], [llava_image(random), llava_image(random)]]
    rows = [make_row(random, (2, *[3] * len(pictures)), pictures) for pictures in images]
    return collate(model, rows)


@pytest.fixture(scope="module", params=["compact_route_stagewise", "physical_delete"])
def routing(request, model, inputs):
    config = RoutingConfig((1, 3), (0.5, 0.25), action=request.param)
    routed = reroute_fx.compile(model, config=config, backend="eager")
    with torch.no_grad():
        return routed(**inputs).routing


@pytest.mark.full("5 s; the search does not use it yet")
def test_each_stage_has_the_share_that_it_keeps_of_the_targets(routing):
    found = stage_agreement(routing, TARGETS)
    assert list(found) == [1, 3]
    for layer, share in found.items():
        kept = [set(row.tolist()) for row in routing.selected[layer]]
        assert [len(row) for row in kept] == ([8, 16] if layer == 1 else [4, 8])
        assert share == (len(kept[0] & {*TARGETS[0]}) / 4 + len(kept[1] & {*TARGETS[1]}) / 2) / 2
    assert 0 < found[1] < 1


def test_layers_count_by_their_weights(routing):
    stages = stage_agreement(routing, TARGETS)
    assert agreement(routing, TARGETS) == pytest.approx((1 + 2 * stages[1] + stages[3]) / LAYERS)
    assert agreement(routing, TARGETS, WEIGHTS) == pytest.approx((4 + stages[1] + 3 * stages[3]) / 8)
    everything = [tuple(row.tolist()) for row in routing.selected[3]]
    assert agreement(routing, everything, [0, 0, 0, 1]) == 1


def test_the_first_decision_keeps_what_the_profile_said(model, inputs):
    """It ranks what the unrouted model attends to; later ones rank what routing has made of it."""
    found = reroute_fx.profile(model, [inputs] * 4, max_new_tokens=4)
    for place in (8, 16):
        config = RoutingConfig((2,), (SHARES[place],))
        with torch.no_grad():
            routing = reroute_fx.compile(model, config=config, backend="eager")(**inputs).routing
        kept = stage_agreement(routing, found.targets[:2])
        assert kept == {2: pytest.approx(found.recall_curves["last"][2, -1, place])}


@pytest.mark.parametrize(
    ("targets", "weights", "message"),
    [
        (TARGETS[:1], None, r"\[4\] tokens for 2 rows"),
        ((TARGETS[0], ()), None, r"\[4, 0\] tokens for 2 rows"),
        (TARGETS, WEIGHTS[:3], "3 entries"),
        (TARGETS, [0.0] * LAYERS, "a sum above 0"),
    ],
)
def test_what_does_not_fit_is_refused(routing, targets, weights, message):
    with pytest.raises(InputError, match=message):
        agreement(routing, targets, weights)


def test_a_routed_model_has_no_profile(model, inputs):
    routed = reroute_fx.compile(model, 0.5, backend="eager")
    with pytest.raises(ConfigError, match="routed already"):
        reroute_fx.profile(routed, [inputs])
