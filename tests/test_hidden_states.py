"""Hidden states of a routed model: the residual stream before each layer, deferred rows as they last ran."""

import pytest
import torch
from conversations import (
    ACTIONS,
    BATCHES,
    DECISIONS,
    EVERYTHING,
    MIXED,
    NOISE,
    SINGLE,
    batch,
    build,
    routed_model,
    unrouted_model,
)
from suite_tiers import one

import reroute_fx
from reroute_fx import InputError, RoutingConfig

pytestmark = pytest.mark.usefixtures("no_gradients", "one_thread")


@pytest.fixture(autouse=True)
def _no_offset_of_an_earlier_prompt():
    """Qwen2.5-VL keeps that of its last prompt on the module and adds it to text that follows, in whichever test."""
    unrouted_model("qwen").model.rope_deltas = None


LAYERS = 4


def assert_equal_states(found, wanted, is_token=None):
    assert len(found) == len(wanted) == LAYERS + 1
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.shape == theirs.shape
        chosen = slice(None) if is_token is None else is_token.bool()
        torch.testing.assert_close(ours[chosen], theirs[chosen], atol=noise(theirs), rtol=0)


def noise(states):
    """`NOISE` is for values near 8; residual streams have larger ones."""
    return NOISE * max(1.0, float(states.abs().max()) / 8)


@one("4 s each")
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("rows", BATCHES)
def test_with_all_tokens_they_are_those_of_the_unrouted_model(family, rows, action):
    inputs = batch(family, *BATCHES[rows])
    routed = routed_model(family, RoutingConfig(DECISIONS, (1.0, 1.0), action))
    found = routed(**inputs, output_hidden_states=True).hidden_states
    wanted = unrouted_model(family)(**inputs, output_hidden_states=True).hidden_states
    assert_equal_states(found, wanted, inputs["attention_mask"])


@one("5 s each")
def test_generation_returns_them_for_each_step(family):
    """Of the prompt and of each token that is fed after it."""
    inputs = batch(family, *MIXED)
    options = {"max_new_tokens": 3, "output_hidden_states": True, "return_dict_in_generate": True}
    found = routed_model(family, EVERYTHING).generate(**inputs, **options).hidden_states
    wanted = unrouted_model(family).generate(**inputs, **options).hidden_states
    assert len(found) == len(wanted) == 3
    for step, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert_equal_states(ours, theirs, inputs["attention_mask"] if step == 0 else None)


def test_several_tokens_on_a_cache_have_them_too(family):
    inputs = batch(family, *SINGLE)
    turn = {"input_ids": torch.tensor([[3, 4, 5]]), "output_hidden_states": True}
    models = routed_model(family, EVERYTHING), unrouted_model(family)
    # The unrouted Qwen2.5-VL keeps the positions of its last prompt, so the calls of one model follow each other.
    found, wanted = (model(**turn, past_key_values=model(**inputs).past_key_values) for model in models)
    assert_equal_states(found.hidden_states, wanted.hidden_states)


@one("3 s each")
@pytest.mark.parametrize("action", ACTIONS)
def test_active_rows_go_through_the_layer_and_others_stay(action):
    """Checked with the layers of the model, one at a time on the active rows."""
    inputs = batch("llava", *SINGLE)
    routed = routed_model("llava", RoutingConfig(DECISIONS, (0.5, 0.25), action))
    output = routed(**inputs, output_hidden_states=True)
    decoder = unrouted_model("llava").model.language_model
    length = inputs["input_ids"].shape[1]
    visual = (inputs["input_ids"][0] == 50).nonzero().flatten()
    active = torch.ones(length, dtype=torch.bool)
    for index, (before, after) in enumerate(
        zip(output.hidden_states, output.hidden_states[1:], strict=False)
    ):
        if index in DECISIONS:
            kept = output.routing.all_kept[index][0]
            active = torch.ones(length, dtype=torch.bool)
            active[visual] = kept
        rows = active.nonzero().flatten()
        rotary = decoder.rotary_emb(before, rows[None])
        wanted = before.clone()
        wanted[:, rows] = decoder.layers[index](
            before[:, rows], position_embeddings=rotary, attention_mask=None
        )
        wanted = decoder.norm(wanted) if index == LAYERS - 1 else wanted
        torch.testing.assert_close(after, wanted, atol=noise(wanted), rtol=0)
    assert not active.all()


def test_programs_that_return_them_are_made_when_they_are_asked_for():
    inputs = batch("llava", *SINGLE)
    routed = reroute_fx.compile(unrouted_model("llava"), config=EVERYTHING, backend="eager")
    assert routed(**inputs).hidden_states is None
    assert set(routed.report.compilations) == {"prefill", "continuation"}
    routed(**inputs, output_hidden_states=True)
    assert set(routed.report.compilations) == {"prefill", "continuation", "prefill with hidden states"}
    # What is exported stays what was compiled.
    assert set(routed.programs) == {"prefill", "continuation"}


@one("4 s each")
def test_some_of_them_by_number(family):
    inputs, routed = batch(family, *SINGLE), routed_model(family)
    every = routed(**inputs, output_hidden_states=True).hidden_states
    found = routed(**inputs, output_hidden_states=[1, -1]).hidden_states
    assert [state is None for state in found] == [True, False, True, True, False]
    assert torch.equal(found[1], every[1])
    assert torch.equal(found[4], every[4])


@pytest.mark.full("7 s; captures another model")
@pytest.mark.parametrize("is_set", ["before", "after"])
def test_the_config_of_the_decoder_asks_for_them(family, is_set):
    model, inputs = build(family), batch(family, *SINGLE)
    model.config.text_config.output_hidden_states = is_set == "before"
    routed = reroute_fx.compile(model, config=EVERYTHING, backend="eager")
    routed.config.text_config.output_hidden_states = True
    found = routed(**inputs).hidden_states
    model.config.text_config.output_hidden_states = True
    assert_equal_states(found, model(**inputs).hidden_states)


@pytest.mark.full("5 s; captures another model")
def test_attention_maps_that_the_config_asks_for_are_refused():
    model = build("llava")
    model.set_attn_implementation("eager")
    model.config.text_config.output_attentions = True
    routed = reroute_fx.compile(model, config=EVERYTHING, backend="eager")
    with pytest.raises(InputError, match="output_attentions is True"):
        routed(**batch("llava", *SINGLE))


@pytest.mark.full("9 s; what is returned is tested in eager, compiling in other tests")
def test_compiled_programs_return_them():
    inputs = batch("llava", *SINGLE)
    options = {"max_new_tokens": 2, "output_hidden_states": True, "return_dict_in_generate": True}
    compiled = reroute_fx.compile(unrouted_model("llava"), config=RoutingConfig(DECISIONS, (0.5, 0.25)))
    found = compiled.generate(**inputs, **options).hidden_states
    wanted = routed_model("llava").generate(**inputs, **options).hidden_states
    for ours, theirs in zip(found, wanted, strict=True):
        assert_equal_states(ours, theirs)
