"""Whether a routed model runs what answers depend on, counted by hand."""

import pytest
import torch
from tiny_models import PAD, collate, llava_config, llava_image, make_row, sharp
from transformers import LlavaForConditionalGeneration

import reroute_fx
from reroute_fx import ConfigError, RoutingConfig
from reroute_fx.tuning.divergence import Losses, Router, answer
from reroute_fx.tuning.proposals import SHARES
from reroute_fx.tuning.targets import Targets, find_targets, missed_targets
from reroute_fx.tuning.watched_model import WatchedModel

LAYERS, ANSWER = 4, 4
SELECTED = {
    1: [torch.tensor([0, 3, 5, 9]), torch.tensor([2, 30])],
    3: [torch.tensor([0, 7]), torch.tensor([2, 31])],
}
WEIGHTS = (0.5, 0.0, 0.125, 0.375)


@pytest.fixture(scope="module")
def model():
    return sharp(LlavaForConditionalGeneration, llava_config(LAYERS, pad_token_id=PAD))


@pytest.fixture(scope="module")
def inputs(model):
    random = torch.Generator().manual_seed(0)
    images = [[llava_image(random)], [llava_image(random), llava_image(random)]]
    rows = [make_row(random, (2, *[3] * len(pictures)), pictures) for pictures in images]
    return collate(model, rows)


def test_layers_miss_what_the_last_decision_before_them_did_not_keep():
    targets = [Targets((0, 3, 5, 15), WEIGHTS), Targets((2, 31), (0.25,) * 4)]
    # Of the first row's targets layers 1 and 2 lack 15, layer 3 lacks 3, 5 and 15.
    assert missed_targets(SELECTED, targets) == (
        pytest.approx(0.125 * 1 / 4 + 0.375 * 3 / 4),
        pytest.approx(0.5 * 1 / 2),
    )
    assert missed_targets({}, targets) == (0, 0)
    assert missed_targets(SELECTED, ()) == ()


def test_what_is_missed_counts_by_its_weight():
    losses = Losses((0.1,), (1.0,), (0.5,)) + Losses((0.2,), (1.0,), (0.0,))
    assert losses.total(0) == (0.1, 0.2)
    assert losses.total(2) == (1.1, 0.2)


@pytest.mark.full("8 s; a search with targets is in the gate")
@pytest.mark.parametrize("action", ["compact_route_stagewise", "physical_delete"])
def test_a_search_counts_what_the_compiled_model_keeps(model, inputs, action):
    config = RoutingConfig((1, 3), (0.5, 0.25), action=action)
    targets = find_targets(WatchedModel(model), inputs, ANSWER)
    unrouted = reroute_fx.compile(model, method="none", backend="eager")
    answered = answer(unrouted, inputs, ANSWER)
    object.__setattr__(answered, "targets", targets)
    with torch.no_grad():
        routing = reroute_fx.compile(model, config=config, backend="eager")(**inputs).routing
    kept = [[{*routing.selected[layer][row].tolist()} for layer in (1, 3)] for row in range(2)]
    expected = []
    for (first, last), each in zip(kept, targets, strict=True):
        shares = [0, *[len({*each.tokens} - first)] * 2, len({*each.tokens} - last)]
        expected.append(sum(w * s / len(each.tokens) for w, s in zip(each.weights, shares, strict=True)))
    assert Router(model, unrouted).losses(config, [answered]).missed == pytest.approx(expected)
    assert 0 < expected[1] < 1


@pytest.mark.full("5 s; the profile's own tests are in the gate")
def test_targets_are_those_of_a_profile(model, inputs):
    """A decision that is the first finds as many as the profile said: it ranks what the unrouted model attends to."""
    found = reroute_fx.profile(model, [inputs] * 4, max_new_tokens=ANSWER)
    targets = find_targets(WatchedModel(model), inputs, ANSWER)
    assert [each.tokens for each in targets] == list(found.targets[:2])
    by_layer = torch.tensor([each.weights for each in targets], dtype=torch.float64).mean(0)
    assert by_layer.tolist() == pytest.approx(found.effect.sum(axis=1).tolist(), abs=1e-6)
    alone = [Targets(each.tokens, (0.0, 0.0, 1.0, 0.0)) for each in targets]
    for place in (8, 16):
        config = RoutingConfig((2,), (SHARES[place],))
        with torch.no_grad():
            routing = reroute_fx.compile(model, config=config, backend="eager")(**inputs).routing
        missed = sum(missed_targets(routing.selected, alone)) / 2
        assert 1 - missed == pytest.approx(found.recall_curves["last"][2, -1, place])


def test_a_routed_model_has_no_profile(model, inputs):
    routed = reroute_fx.compile(model, 0.5, backend="eager")
    with pytest.raises(ConfigError, match="routed already"):
        reroute_fx.profile(routed, [inputs])
