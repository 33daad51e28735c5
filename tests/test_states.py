"""Layers that know earlier tokens by a state: linear attention with a convolution, and convolutions alone."""

import functools

import pytest
import torch
from by_hand import by_hand
from conversations import ACTIONS, GREEDY, expect_same_answers
from suite_tiers import share

import reroute_fx
from reroute_fx import InputError, RoutingConfig, UnsupportedModelError
from reroute_fx.runtime.slots import SlotPool

FAMILIES = share(["Qwen3.5", "LFM2-VL"], ["Qwen3.5"], "4 s each to capture a model")
DECISIONS = (1, 2)
"""Before an attention and before a state, which asks the attention behind it: the nearest two are as near."""
ROUTING = RoutingConfig(DECISIONS, (0.5, 0.25))
EVERYTHING = RoutingConfig(DECISIONS, (1.0, 1.0))
TOLERANCE = 1e-4
"""Of logits near 30 of weights ten times what is usual; another selection moves them by 1 and more."""

pytestmark = pytest.mark.usefixtures("no_gradients", "one_thread")


@functools.cache
def built(tiny, family):
    model = tiny.FAMILIES[family].build()
    model.set_attn_implementation({"text_config": "eager"})  # it returns maps
    return model


@functools.cache
def routed_model(tiny, family, config=ROUTING):
    return reroute_fx.compile(built(tiny, family), config=config, backend="eager")


def prompts(tiny, family):
    return tiny.prompts(built(tiny, family), tiny.FAMILIES[family])


@pytest.mark.parametrize(
    "action", share(ACTIONS, ["compact_route_stagewise"], "2 s each; actions are one for all kinds of layers")
)
@pytest.mark.parametrize("family", FAMILIES)
def test_routed_as_by_hand(tiny, family, action):
    """Tokens that wait enter no state of their stage."""
    given = tiny.row(prompts(tiny, family), 0)
    config = RoutingConfig(DECISIONS, ROUTING.keep_ratios, action)
    logits, kept = by_hand(built(tiny, family), given, config)
    output = routed_model(tiny, family, config)(**given)
    assert {layer: rows[0].tolist() for layer, rows in output.routing.selected.items()} == kept
    torch.testing.assert_close(output.logits, logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_batch_are_as_alone(tiny, family):
    """In a prompt, in an answer, and in a turn of another length for each row."""
    routed, given = routed_model(tiny, family), prompts(tiny, family)
    real = given["attention_mask"].bool()
    together, answers = routed(**given), routed.generate(**given, **GREEDY)
    turn = torch.tensor([[9, 11, 13], [0, 8, 6]])
    mask = torch.cat([given["attention_mask"], (turn > 0).long()], dim=1)
    later = routed(input_ids=turn, attention_mask=mask, past_key_values=together.past_key_values).logits
    for i in range(2):
        alone = tiny.row(given, i)
        output = routed(**alone)
        torch.testing.assert_close(together.logits[i][real[i]], output.logits[0], atol=TOLERANCE, rtol=0)
        new = routed.generate(**alone, **GREEDY)[:, alone["input_ids"].shape[1] :]
        assert torch.equal(answers[i : i + 1, given["input_ids"].shape[1] :], new)
        single = [token for token in turn[i].tolist() if token]
        for token in single:  # one by one
            step = torch.tensor([[token]])
            output = routed(input_ids=step, past_key_values=output.past_key_values)
        torch.testing.assert_close(later[i, -1], output.logits[0, -1], atol=TOLERANCE, rtol=0)


@pytest.mark.full("10 s; the record of families has it, and the gate rows as by hand")
@pytest.mark.parametrize("family", ["Qwen3.5", "LFM2-VL"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_keeping_everything_is_the_unrouted_model(tiny, family, options):
    model, given = built(tiny, family), prompts(tiny, family)
    expect_same_answers(routed_model(tiny, family, EVERYTHING), model, given, TOLERANCE, **GREEDY, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_of_text_is_answered_by_the_model(tiny, family):
    """Its cache has keys in some layers only."""
    model, ids = built(tiny, family), torch.tensor([[1, 7, 9, 11, 13], [1, 8, 6, 5, 12]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expect_same_answers(routed_model(tiny, family), model, given, TOLERANCE, **GREEDY)


@pytest.mark.full("60 s to compile")
def test_compiled(tiny):
    model, given = built(tiny, "Qwen3.5"), prompts(tiny, "Qwen3.5")
    compiled = reroute_fx.compile(model, config=ROUTING, backend="inductor")
    expect_same_answers(compiled, routed_model(tiny, "Qwen3.5"), given, TOLERANCE, **GREEDY)


def test_what_needs_keys_and_values_is_refused(tiny, tmp_path):
    routed = routed_model(tiny, "Qwen3.5")
    with pytest.raises(
        UnsupportedModelError, match=r"scan their tokens one after another.*can't be exported"
    ):
        reroute_fx.export(routed, tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()
    with pytest.raises(UnsupportedModelError, match="know earlier tokens by a state"):
        SlotPool(routed, rows=2, capacity=64)
    output = routed(**prompts(tiny, "Qwen3.5"))
    with pytest.raises(InputError, match="can't be cropped"):
        output.past_key_values.crop(4)
