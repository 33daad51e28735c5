"""Pictures whose tokens see each other, in windows too, and layers that see chunks, against loops over tokens."""

import functools

import pytest
import torch
import torch.utils._pytree as pytree
from artifacts import without_its_class
from conversations import ACTIONS, GREEDY, expect_same_answers
from suite_tiers import share
from tiny_models import IMAGE, TEXT, VISION, sharp
from transformers import (
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaConfig,
    Llama4TextConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.models.gemma3 import modeling_gemma3

import reroute_fx
from reroute_fx import InputError, RoutingConfig, UnsupportedModelError
from reroute_fx.capture.prompt_groups import PromptGroups, find_groups, grouped_layers

WINDOW, CHUNK = 8, 8
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
SIZES = {**TEXT, "num_hidden_layers": 3, "head_dim": 8}
DECISIONS = (1, 2)
EVERYTHING = RoutingConfig(DECISIONS, (1.0, 1.0))
TOLERANCE = 1e-5
"""Of logits near 4; a token more or less that is seen moves them by 1e-2 and more."""

pytestmark = pytest.mark.usefixtures("no_gradients", "one_thread")


def gemma3():
    text = {**SIZES, "sliding_window": WINDOW, "layer_types": KINDS}
    config = Gemma3Config(
        text_config=text,
        vision_config=VISION,
        image_token_index=IMAGE,
        mm_tokens_per_image=16,
        boi_token_index=48,
        eoi_token_index=47,
    )
    model = sharp(Gemma3ForConditionalGeneration, config)
    model.model.multi_modal_projector.mm_input_projection_weight.normal_()  # it starts as zeros
    return model


def paligemma(text=GemmaConfig, **options):
    config = PaliGemmaConfig(
        text_config=text(**SIZES, **options),
        vision_config=SiglipVisionConfig(**VISION, vocab_size=64),
        image_token_index=IMAGE,
        projection_dim=32,
    )
    return sharp(PaliGemmaForConditionalGeneration, config)


def llama4():
    """Layers that see chunks, and experts of which each gets all tokens; temperatures by place are refused."""
    text = Llama4TextConfig(
        **SIZES,
        intermediate_size_mlp=64,
        num_local_experts=2,
        attention_chunk_size=CHUNK,
        attn_temperature_tuning=False,
        layer_types=["chunked_attention", "full_attention", "chunked_attention"],
        no_rope_layers=[1, 0, 1],
    )
    config = LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_index=IMAGE)
    return sharp(LlavaForConditionalGeneration, config)


def paligemma2():
    """Its logits are bounded behind the head, by the model."""
    return paligemma(Gemma2Config, final_logit_softcapping=2.0)


BUILD = {"Gemma 3": gemma3, "PaliGemma": paligemma, "Llama 4": llama4}
FAMILIES = share(BUILD, ["Gemma 3", "Llama 4"], "5 s each; groups without windows")
ROUTING = RoutingConfig(DECISIONS, (0.5, 0.25), "physical_delete")
LIMITED = (0, 2)
"""Layers with a window or with chunks, in those that have them."""


@functools.cache
def built(family):
    with torch.no_grad():
        model = {**BUILD, "PaliGemma 2": paligemma2}[family]()
    model.set_attn_implementation({"text_config": "eager"})  # it returns maps
    return model


@functools.cache
def routed_model(family, config):
    return reroute_fx.compile(built(family), config=config, backend="eager")


def prompts(family):
    """Two rows, padded on the left. The second has its picture elsewhere, and a text that is longer than a window."""
    picture = [IMAGE] * 16
    ids = torch.tensor(
        [[1, 7, *picture, *range(9, 19)], [0, 0, 3, 20, 21, 22, *picture, 5, 6, 8, 11, 12, 13]]
    )
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    # PaliGemma's prompts see each other as a whole, Gemma's pictures do.
    types = (ids == IMAGE).long() if family == "Gemma 3" else torch.zeros_like(ids)
    given = {"input_ids": ids, "pixel_values": pixels, "attention_mask": (ids != 0).long()}
    return given if family == "Llama 4" else given | {"token_type_ids": types}


def row(family, number):
    given = prompts(family)
    is_token = given["attention_mask"][number].bool()
    of_tokens = {name: each[number, is_token][None] for name, each in given.items() if each.ndim == 2}
    return {**of_tokens, "pixel_values": given["pixel_values"][number : number + 1]}


@pytest.mark.full("5 s each; routed and continued as by hand in the gate")
@pytest.mark.parametrize("family", BUILD)
def test_keeping_everything_is_the_unrouted_model(family):
    model, routed, given = built(family), routed_model(family, EVERYTHING), prompts(family)
    is_token = given["attention_mask"].bool()
    first, expected = (each(**given) for each in (routed, model))
    torch.testing.assert_close(first.logits[is_token], expected.logits[is_token], atol=TOLERANCE, rtol=0)
    assert torch.equal(routed.generate(**given, **GREEDY), model.generate(**given, **GREEDY))
    # A later turn, longer than a window.
    turn = torch.arange(20, 32).expand(2, -1)
    mask = torch.cat([given["attention_mask"], torch.ones_like(turn)], dim=1)
    ours, theirs = (
        each(input_ids=turn, attention_mask=mask, past_key_values=output.past_key_values).logits
        for each, output in ((routed, first), (model, expected))
    )
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


def sees(family, number, groups, query, key):
    """Whether a token sees another in a layer, by their places in the prompt."""
    is_limited = number in LIMITED
    together = groups[key] == groups[query] != 0
    if family == "Gemma 3":
        return (key <= query or together) and (not is_limited or key > query - WINDOW)
    if family == "Llama 4":
        return key <= query and (not is_limited or key // CHUNK == query // CHUNK)
    return key <= query or together


def by_hand(family, given, config):
    """Logits and kept tokens of one row, by the decoder's own layers on slices of the stream."""
    model, seen = built(family), []
    decoder = model.model.language_model
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args[0], kwargs)), with_kwargs=True
        )
        for layer in decoder.layers
    ]
    model(**given)
    for hook in hooks:
        hook.remove()
    visual = (given["input_ids"][0] == IMAGE).nonzero().flatten().tolist()
    hidden = seen[0][0].clone()
    everything = list(range(hidden.shape[1]))
    types = given.get("token_type_ids", torch.ones_like(given["input_ids"]))[0]
    groups = (types == (1 if family == "Gemma 3" else 0)).int().tolist()

    def call(module, number, rows, tokens, mask):
        rotary = pytree.tree_map(lambda part: part[:, tokens], seen[number][1]["position_embeddings"])
        return module(rows, attention_mask=mask, position_embeddings=rotary)

    def run(number, active):
        entries = [[sees(family, number, groups, query, key) for key in active] for query in active]
        mask = torch.tensor(0.0).where(torch.tensor(entries), -torch.inf)[None, None]
        output = call(decoder.layers[number], number, hidden[:, active], active, mask)
        return output[0] if isinstance(output, tuple) else output

    pool, active, kept = everything, everything, {}
    for number, layer in enumerate(decoder.layers):
        if number in config.decision_layers:
            if config.action == "physical_delete":
                pool = active
            normed = layer.input_layernorm(hidden[:, pool])
            _, maps = call(layer.self_attn, number, normed, pool, torch.zeros(1, 1, len(pool), len(pool)))
            scores = dict(zip(pool, maps[0, :, -1].mean(0).tolist(), strict=True))
            count = int(len(visual) * config.keep_ratios[config.decision_layers.index(number)])
            ranked = sorted((token for token in visual if token in scores), key=lambda token: -scores[token])
            active = [token for token in pool if token not in visual or token in ranked[:count]]
            kept[number] = sorted(visual.index(token) for token in ranked[:count])
        hidden[:, active] = run(number, active)
    return model.lm_head(decoder.norm(hidden)), kept


@pytest.mark.parametrize("action", share(ACTIONS, ["physical_delete"], "3 s"))
@pytest.mark.parametrize("family", FAMILIES)
def test_routed_as_by_hand(family, action):
    """A row of a padded batch, with what is left of its picture in each stage."""
    config = RoutingConfig(DECISIONS, (0.5, 0.25), action)
    output = routed_model(family, config)(**prompts(family))
    is_token = prompts(family)["attention_mask"].bool()
    for number in range(2):
        logits, kept = by_hand(family, row(family, number), config)
        found = {layer: rows[number].tolist() for layer, rows in output.routing.selected.items()}
        assert found == kept
        torch.testing.assert_close(output.logits[number, is_token[number]], logits[0], atol=TOLERANCE, rtol=0)


def test_groups_matter():
    """Without them the tests here would hold for a program that has lost them."""
    given = row("Gemma 3", 0)
    found = [
        routed_model("Gemma 3", ROUTING)(**given, token_type_ids=types).logits
        for types in (given.pop("token_type_ids"), torch.zeros_like(given["input_ids"]))
    ]
    assert (found[0] - found[1]).abs().max() > 1e-2


def test_masks_that_are_nearly_those_are_refused(monkeypatch):
    """One entry of one kind of layer is another."""
    original = modeling_gemma3.create_masks_for_vision_model

    def other(**given):
        masks = original(**given)
        masks["sliding_attention"][..., 15, 7] = True
        return masks

    monkeypatch.setattr(modeling_gemma3, "create_masks_for_vision_model", other)
    with pytest.raises(
        UnsupportedModelError, match="attention mask in which token 15 sees token 7; expected"
    ):
        routed_model("Gemma 3", ROUTING)(**row("Gemma 3", 0))


@pytest.mark.full("4 s; the model is not in the gate")
def test_prompts_without_a_mask_are_refused_where_all_would_see_all():
    """Fused attention gets no mask then, and is told that nothing is causal."""
    routed = reroute_fx.compile(paligemma(), config=EVERYTHING, backend="eager")
    given = row("PaliGemma", 0)
    assert routed(**given).logits.isfinite().all()
    del given["token_type_ids"], given["attention_mask"]
    with pytest.raises(InputError, match="Pass token_type_ids as the processor returns them"):
        routed(**given)


@pytest.mark.full("60 s; the gate compiles regions of other decoders")
@pytest.mark.parametrize("family", BUILD)
def test_compiled(family):
    config, given = RoutingConfig(DECISIONS, (0.5, 0.25)), prompts(family)
    compiled, eager = reroute_fx.compile(built(family), config=config), routed_model(family, config)
    expect_same_answers(compiled, eager, given, 1e-4, **GREEDY)


def test_groups_follow_from_the_ids():
    is_visual = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1], [0, 1, 1, 0, 0, 0, 0, 1]]).bool()
    is_token = torch.tensor([[1] * 8, [0] + [1] * 7]).bool()
    pictures, prompt = PromptGroups("pictures"), PromptGroups("prompt")
    assert pictures(is_visual, is_token).tolist() == [[0, 0, 1, 1, 0, 2, 2, 2], [0, 1, 1, 0, 0, 0, 0, 2]]
    assert torch.equal(prompt(is_visual, is_token), is_token.long())
    pictures.check_types(is_visual.long(), is_visual, is_token)
    padded = torch.zeros_like(is_visual).long()
    padded[1, 0] = 1
    prompt.check_types(padded, is_visual, is_token)
    for types in (torch.zeros(2, 8), torch.zeros(2, 7)):
        with pytest.raises(InputError, match=r"token_type_ids.*those of each picture.*Leave it out"):
            pictures.check_types(types.long(), is_visual, is_token)


def test_groups_are_those_of_the_models_own_masks(monkeypatch):
    models = {family: built(family) for family in BUILD}
    assert find_groups(models["Gemma 3"]) == PromptGroups("pictures")
    assert find_groups(models["PaliGemma"]) == PromptGroups("prompt")
    assert find_groups(models["Llama 4"]) is None
    for family, layers in {"Gemma 3": (0, 1, 2), "PaliGemma": (0, 1, 2), "Llama 4": ()}.items():
        assert grouped_layers(models[family], KINDS) == layers
    own = models["Gemma 3"].create_masks_for_generate

    def with_one_more(**given):
        masks = own(**given)
        masks["full_attention"][:, :, 0, 1] = 0
        return masks

    monkeypatch.setattr(models["Gemma 3"], "create_masks_for_generate", with_one_more)
    with pytest.raises(
        UnsupportedModelError, match=r"lets other tokens see each other.*use reroute_fx.compile"
    ):
        find_groups(models["Gemma 3"])


def test_groups_in_some_layers_only(benchmark_module):
    """Of Gemma 4 those with a window; the smaller models have none."""
    tiny = benchmark_module("tiny_families")
    models = {name: tiny.FAMILIES[name].build() for name in ("Gemma 4 with experts", "Gemma 4")}
    kinds = models["Gemma 4"].config.text_config.layer_types
    assert [grouped_layers(model, kinds) for model in models.values()] == [(0, 2), ()]
    assert [find_groups(model) for model in models.values()] == [PromptGroups("pictures"), None]
    assert grouped_layers(models["Gemma 4"].to("meta"), kinds) == (0, 1, 2, 3)


@pytest.mark.parametrize("family", share(["Gemma 3", "PaliGemma", "PaliGemma 2"], ["Gemma 3"], "6 s each"))
def test_a_model_without_its_class_sees_the_same(family):
    routed, given = routed_model(family, ROUTING), prompts(family)
    loaded = without_its_class(routed)
    real, expected = given["attention_mask"].bool(), routed(**given).logits
    for more in ({}, {"token_type_ids": None}):
        assert (loaded(**{**given, **more}).logits - expected)[real].abs().max() < TOLERANCE
    assert torch.equal(loaded.generate(**given, **GREEDY), routed.generate(**given, **GREEDY))
    with pytest.raises(InputError, match=r"token_type_ids.*say that other tokens see each other"):
        loaded(**{**given, "token_type_ids": 1 - given["token_type_ids"]})
