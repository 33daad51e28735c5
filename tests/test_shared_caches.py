"""Layers that attend with keys and values of an earlier one, and embeddings for each layer, against plain loops."""

import functools
from dataclasses import replace

import pytest
import torch
from conversations import ACTIONS, GREEDY, expect_same_answers
from suite_tiers import share

import reroute_fx
from reroute_fx import RoutingConfig, UnsupportedModelError
from reroute_fx.passes import MatchError
from reroute_fx.passes.shared_caches import cache_owners
from reroute_fx.rules import AttentionRule
from reroute_fx.tuning.divergence import Router

FAMILY = "Gemma 4"
KINDS = ["sliding_attention", "full_attention", *["sliding_attention"] * 2, "full_attention"]
WINDOW = 8
SOURCES = (0, 1, 0, 0, 1)
"""The later three layers share keys and values of the last earlier layer of their kind."""
DECISIONS = {"within": (1,), "across": (1, 3)}
"""Layer 4 has its source in its own stage, and 2 and 3 share a cache; or all have it in an earlier stage."""
CASES = [(where, action) for action in ACTIONS for where in DECISIONS]
TOLERANCE = 2e-5
"""Of logits near 4, by attention step by step; another selection moves them by 1e-2 and more."""

pytestmark = pytest.mark.usefixtures("no_gradients", "one_thread")


@functools.cache
def family(tiny):
    found = tiny.FAMILIES[FAMILY]
    sizes = {"num_hidden_layers": 5, "num_kv_shared_layers": 3, "layer_types": list(KINDS)}
    return replace(found, text={**found.text, **sizes})


@functools.cache
def built(tiny):
    model = family(tiny).build()
    for number, layer in enumerate(model.model.language_model.layers):
        layer.layer_scalar.fill_(0.7 + 0.1 * number)  # as trained, not 1
    model.set_attn_implementation({"text_config": "eager"})  # it returns maps
    return model


@functools.cache
def routed_model(tiny, config):
    return reroute_fx.compile(built(tiny), config=config, backend="eager")


def routing(where, action=ACTIONS[0], ratios=(0.5, 0.25)):
    return RoutingConfig(DECISIONS[where], ratios[: len(DECISIONS[where])], action)


def prompts(tiny):
    return tiny.prompts(built(tiny), family(tiny))


def inputs_of_layers(model, given):
    """What each layer of the decoder is called with."""
    seen = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, more: seen.append((args, more)), with_kwargs=True)
        for layer in model.model.language_model.layers
    ]
    model(**given)
    for hook in hooks:
        hook.remove()
    return seen


def by_hand(tiny, given, config, kept=None):
    """Logits of a row, and the visual tokens that each decision keeps, by the decoder's layers on slices of its stream.

    Keys and values that layers share are those of all rows, as the stream is before the layer that has them; each layer
    takes those of its own rows.

    Of a row without padding; `kept` says what decisions keep, None lets attention say it.
    """
    model = built(tiny)
    decoder, seen = model.model.language_model, inputs_of_layers(model, given)
    hidden, ids = seen[0][0][0].clone(), given["input_ids"][0]
    visual, everything = (ids == tiny.IMAGE).nonzero().flatten().tolist(), list(range(len(ids)))
    states = {}

    def call(module, number, rows, tokens, *more):
        own, kind = SOURCES[number], KINDS[number]
        shared = {kind: tuple(each[:, :, tokens] for each in states[own])} if own != number else {}
        rotary = [part[:, tokens] for part in seen[number][1]["position_embeddings"]]
        reach = WINDOW if kind == KINDS[0] else len(ids)
        mask = [[0.0 if query - reach < key <= query else -torch.inf for key in tokens] for query in tokens]
        mask = torch.tensor(mask) if more else torch.zeros(len(tokens), len(tokens))  # decisions look at all
        return shared, module(
            rows,
            *more,
            shared_kv_states=shared,
            position_embeddings=rotary,
            attention_mask=mask[None, None],
        )

    def look(number, tokens):
        layer = decoder.layers[number]
        shared, (_, maps) = call(layer.self_attn, number, layer.input_layernorm(hidden[:, tokens]), tokens)
        return shared, maps

    pool, active, found = everything, everything, {}
    for number, layer in enumerate(decoder.layers):
        if number in config.decision_layers:
            if config.action == "physical_delete":
                pool = active
            scores = dict(zip(pool, look(number, pool)[1][0, :, -1].mean(0).tolist(), strict=True))
            count = max(1, int(len(visual) * config.keep_ratios[config.decision_layers.index(number)]))
            ranked = sorted((token for token in visual if token in scores), key=lambda token: -scores[token])
            best = [visual.index(token) for token in ranked[:count]] if kept is None else kept[number]
            found[number] = sorted(best)
            active = [token for token in pool if token not in visual or visual.index(token) in best]
        if number in SOURCES[2:]:
            states[number] = look(number, everything)[0][KINDS[number]]
        more = seen[number][0][1][:, active]
        hidden[:, active] = call(layer, number, hidden[:, active], active, more)[1]
    return model.lm_head(decoder.norm(hidden)), found


def greedily(tiny, given, config, kept):
    """12 tokens behind a prompt, each by the whole row anew."""
    tokens = []
    for _ in range(GREEDY["max_new_tokens"]):
        said = torch.tensor([tokens], dtype=torch.int64)
        more = {"input_ids": said, "attention_mask": torch.ones_like(said), "mm_token_type_ids": 0 * said}
        longer = given | {name: torch.cat([given[name], each], dim=1) for name, each in more.items()}
        tokens.append(by_hand(tiny, longer, config, kept)[0][0, -1].argmax().item())
    return tokens


@pytest.mark.parametrize(
    ("where", "action"),
    share(CASES, [("across", ACTIONS[0])], "2 s each; actions are one for all kinds of layers"),
)
def test_routed_as_by_hand(tiny, where, action):
    """Each row of a padded batch: logits and selections; and 12 tokens behind the padded one."""
    config, given = routing(where, action), prompts(tiny)
    routed, is_token = routed_model(tiny, config), given["attention_mask"].bool()
    output, answers = routed(**given), routed.generate(**given, **GREEDY)
    for number in range(2):
        alone = tiny.row(given, number)
        logits, kept = by_hand(tiny, alone, config)
        assert {layer: rows[number].tolist() for layer, rows in output.routing.selected.items()} == kept
        torch.testing.assert_close(output.logits[number, is_token[number]], logits[0], atol=TOLERANCE, rtol=0)
    assert answers[1, is_token.shape[1] :].tolist() == greedily(tiny, alone, config, kept)
    held = [i for i, layer in enumerate(output.past_key_values.layers) if layer.is_initialized]
    assert held == sorted({*cache_owners(SOURCES, DECISIONS[where])})
    assert routed.report.sources == SOURCES


@pytest.mark.full("2 s each; the record of families has it, and the gate rows as by hand")
@pytest.mark.parametrize("where", DECISIONS)
def test_keeping_everything_is_the_unrouted_model(tiny, where):
    routed = routed_model(tiny, routing(where, ratios=(1.0, 1.0)))
    expect_same_answers(routed, built(tiny), prompts(tiny), TOLERANCE, **GREEDY)


def test_text_alone_is_left_to_the_model(tiny):
    """On its own cache, too, which holds fewer layers than the decoder has."""
    routed, ids = routed_model(tiny, routing("across")), torch.arange(1, 12)[None]
    first, expected = routed(input_ids=ids), built(tiny)(input_ids=ids)
    more = {"input_ids": ids[:, :3], "attention_mask": torch.ones(1, 14)}
    found = routed(**more, past_key_values=first.past_key_values).logits
    wanted = built(tiny)(**more, past_key_values=expected.past_key_values).logits
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)


def test_embeddings_for_each_layer_matter(tiny):
    """Without them the tests here would hold for a program that has lost them."""
    routed, given = routed_model(tiny, routing("across")), tiny.row(prompts(tiny), 0)
    decoder = built(tiny).model.language_model
    logits = routed(**given).logits
    decoder.embed_tokens_per_layer.weight.mul_(-1)
    try:
        assert (routed(**given).logits - logits).abs().max() > 0.1
    finally:
        decoder.embed_tokens_per_layer.weight.mul_(-1)


def test_what_cannot_share_is_refused(tiny, tmp_path):
    config = routing("across")
    with pytest.raises(
        UnsupportedModelError, match=r"takes per_layer_inputs for each token.*can't be exported"
    ):
        reroute_fx.export(routed_model(tiny, config), tmp_path / "artifact")
    rules = AttentionRule(), AttentionRule(rotary=False)
    with pytest.raises(
        MatchError, match=r"keys of layer 3 without rotary positions.*rotated ones of layer 0"
    ):
        routed_model(tiny, replace(config, method="rules", rules=rules))
    with pytest.raises(UnsupportedModelError, match=r"which is what a pool has caches for"):
        reroute_fx.SlotPool(routed_model(tiny, config), rows=2, capacity=64)


@pytest.mark.full("60 s to compile")
def test_compiled(tiny):
    config = routing("across")
    compiled = reroute_fx.compile(built(tiny), config=config, backend="inductor")
    expect_same_answers(compiled, routed_model(tiny, config), prompts(tiny), 1e-4, **GREEDY)


@pytest.mark.full("3 s; tests/test_windows.py has the same of a decoder with its own caches")
@pytest.mark.parametrize("decisions", [(1,), (2, 3)])
def test_tuning_continues_as_the_compiled_model(tiny, decisions):
    """In a program in which each layer is a stage of its own, layers write into the cache that they share."""
    model, given = built(tiny), prompts(tiny)
    config = RoutingConfig(decisions, (0.5, 0.25)[: len(decisions)])
    router = Router(model, reroute_fx.compile(model, method="none", backend="eager"))
    turn = torch.arange(20, 32).expand(2, -1)
    mask = torch.cat([given["attention_mask"], torch.ones_like(turn)], dim=1)
    found, expected = (
        each(input_ids=turn, attention_mask=mask, past_key_values=each(**given).past_key_values).logits
        for each in (router.routed(config), routed_model(tiny, config))
    )
    assert torch.equal(found, expected)
