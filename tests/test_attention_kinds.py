"""Decoders with bounded logits or with latent keys and values: routed and ranked as they attend."""

import pytest
import torch
from by_hand import by_hand
from conversations import GREEDY, expect_same_answers
from suite_tiers import share
from tiny_models import IMAGE, TEXT, VISION, sharp
from transformers import (
    CLIPVisionConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import reroute_fx
from reroute_fx import InputError, RoutingConfig, UnsupportedModelError
from reroute_fx.runtime import SlotPool

EVERYTHING = RoutingConfig((1,), (1.0,))
LATENT = {
    **TEXT,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 4,
}
EXPERTS = {
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
}
TOLERANCE = 1e-5
"""Of logits near 4; another selection moves them by 1e-2 and more."""

pytestmark = pytest.mark.usefixtures("no_gradients", "one_thread")


def gemma_2(softcap=2.0):
    return Gemma2Config(
        **TEXT,
        num_hidden_layers=3,
        head_dim=8,
        layer_types=["full_attention"] * 3,
        attn_logit_softcapping=softcap,
        query_pre_attn_scalar=8,
    )


def over(text):
    config = LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_index=IMAGE)
    model = sharp(LlavaForConditionalGeneration, config)
    model.set_attn_implementation({"text_config": "eager"})
    return model


DECODERS = {
    "soft cap": gemma_2,
    "latent": lambda: DeepseekV3Config(
        **LATENT | {"q_lora_rank": None}, num_hidden_layers=2, first_k_dense_replace=2, rope_interleave=False
    ),
    "latent, experts": lambda: DeepseekV3Config(**LATENT, **EXPERTS, num_hidden_layers=3),
    "latent, experts, V2": lambda: DeepseekV2Config(
        **LATENT, **EXPERTS, num_hidden_layers=3, topk_method="greedy"
    ),
}


@pytest.fixture(
    scope="module",
    params=share(DECODERS, ["soft cap", "latent"], "20 s each to trace experts and what is written in place"),
)
def model(request):
    with torch.no_grad():
        return over(DECODERS[request.param]())


def halves(model, action="compact_route_stagewise"):
    """Of what there is 1/2 from the second layer on, 1/4 from the third."""
    layers = tuple(range(1, model.config.text_config.num_hidden_layers))
    return RoutingConfig(layers, (0.5, 0.25)[: len(layers)], action)


def prompts():
    """Two rows of different lengths, padded on the left."""
    ids = torch.tensor([[1, 7, *[IMAGE] * 16, 9, 11, 13], [0, 0, 3, *[IMAGE] * 16, 5, 6]])
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": (ids != 0).long()}


def first_row():
    given = prompts()
    return {"input_ids": given["input_ids"][:1], "pixel_values": given["pixel_values"][:1]}


def test_keeping_everything_is_the_unrouted_model(model):
    routed, given = reroute_fx.compile(model, config=EVERYTHING, backend="eager"), prompts()
    expect_same_answers(routed, model, given, TOLERANCE, **GREEDY)


@pytest.mark.parametrize(
    "action",
    share(["compact_route", "compact_route_stagewise"], ["compact_route_stagewise"], "bit-identical"),
)
def test_routed_as_by_hand_and_alone_as_in_a_padded_batch(model, action):
    given = first_row()
    config = halves(model, action)
    logits, kept = by_hand(model, given, config)
    routed = reroute_fx.compile(model, config=config, backend="eager")
    for output in (routed(**given), routed(**prompts())):
        assert {layer: rows[0].tolist() for layer, rows in output.routing.selected.items()} == kept
        torch.testing.assert_close(output.logits[:1], logits, atol=TOLERANCE, rtol=0)


def test_a_conversation_of_text_alone_goes_on_its_cache(model):
    """It runs unrouted, on the cache of the model's own decoder: latent vectors are cached as one head."""
    routed = reroute_fx.compile(model, config=EVERYTHING, backend="eager")
    given = {"input_ids": torch.tensor([[1, 5, 17, 23, 29]])}
    expected, found = (each.generate(**given, **GREEDY) for each in (model, routed))
    assert torch.equal(found, expected)
    cache = routed(**given).past_key_values
    cache.layers.pop()
    with pytest.raises(InputError, match=r"past_key_values holds .* layers of 1 rows with .*; expected "):
        routed(input_ids=torch.tensor([[5]]), past_key_values=cache)


def test_latent_keys_and_values_are_refused_by_pools(model):
    routed = reroute_fx.compile(model, config=EVERYTHING, backend="eager")
    if hasattr(model.config.text_config, "kv_lora_rank"):
        with pytest.raises(UnsupportedModelError, match=r"of latent vectors.*Use a RoutedCache for each"):
            SlotPool(routed, 2, 30)
    else:
        assert SlotPool(routed, 2, 30).free == 2


@pytest.mark.full("25 s each; benchmarks/results/families.json holds that their artifacts answer as they do")
def test_an_artifact_answers_as_the_model(model, tmp_path):
    routed = reroute_fx.compile(model, config=halves(model), backend="eager")
    loaded = reroute_fx.load(reroute_fx.export(routed, tmp_path / "artifact", format="onnx"))
    expect_same_answers(loaded, routed, prompts(), 1e-4, **GREEDY)


@pytest.mark.full("4 s; the gate holds capped rankings against the decoder's own attention maps")
def test_without_the_cap_another_ranking_and_other_states():
    """The same weights: what the cap does is not noise."""
    config, given = RoutingConfig((1,), (0.25,)), first_row()
    capped, free = (
        reroute_fx.compile(over(gemma_2(cap)), config=config, backend="eager")(**given) for cap in (2.0, None)
    )
    assert capped.routing.selected[1][0].tolist() != free.routing.selected[1][0].tolist()
    assert (capped.logits - free.logits).abs().max() > 0.01


@pytest.mark.full("20 s; compiled regions of other decoders are in the gate")
def test_compiled(model):
    given = prompts()
    compiled, eager = (
        reroute_fx.compile(model, config=halves(model), backend=b) for b in ("inductor", "eager")
    )
    expect_same_answers(compiled, eager, given, 1e-4, **GREEDY)
