"""Decoders with attention sinks: routed as the model attends, and ranked with the sinks in the softmax."""

import pytest
import torch
from by_hand import by_hand
from conversations import GREEDY, expect_same_answers
from suite_tiers import share
from tiny_models import IMAGE, TEXT, VISION, sharp
from transformers import (
    CLIPVisionConfig,
    GptOssConfig,
    GraniteSWAConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import reroute_fx
from reroute_fx import Limits, RoutingConfig, UnsupportedModelError
from reroute_fx.capture import attention_forms

SIZES = {**TEXT, "num_hidden_layers": 3, "head_dim": 8}
FULL = {"layer_types": ["full_attention"] * 3}
EVERYTHING = RoutingConfig((1,), (1.0,))
ROUTING = RoutingConfig((1, 2), (0.5, 0.25))
TOLERANCE = 1e-5
"""Of logits near 4; another selection moves them by 1e-2 and more."""

pytestmark = pytest.mark.usefixtures("no_gradients", "one_thread")


def over(text):
    config = LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_index=IMAGE)
    model = sharp(LlavaForConditionalGeneration, config)
    model.set_attn_implementation({"text_config": "eager"})
    for layer in model.model.language_model.layers:
        layer.self_attn.sinks.copy_(torch.linspace(-2, 4, 4))
    return model


def gpt_oss(**options):
    return over(GptOssConfig(**SIZES, num_local_experts=4, **{**FULL, **options}))


def granite_swa():
    return over(GraniteSWAConfig(**SIZES, **FULL))


BUILD = {"gpt_oss": gpt_oss, "granite_swa": granite_swa}
FAMILIES = share(BUILD, ["gpt_oss"], "10 s; the same operator in another decoder")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    with torch.no_grad():
        return BUILD[request.param]()


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


@pytest.mark.parametrize("action", ["compact_route", "compact_route_stagewise"])
def test_routed_as_by_hand(action):
    model, given = gpt_oss(), first_row()
    config = RoutingConfig(ROUTING.decision_layers, ROUTING.keep_ratios, action)
    logits, kept = by_hand(model, given, config)
    output = reroute_fx.compile(model, config=config, backend="eager")(**given)
    assert {layer: rows[0].tolist() for layer, rows in output.routing.selected.items()} == kept
    torch.testing.assert_close(output.logits, logits, atol=TOLERANCE, rtol=0)


def test_the_ranking_is_that_of_the_attention_with_sinks():
    """Heads count by what their sinks leave: the mean of the maps without sinks ranks in another order."""
    model, given = gpt_oss(), first_row()
    config = RoutingConfig((1,), (0.25,))
    with_sinks = reroute_fx.compile(model, config=config, backend="eager")(**given).routing
    total = with_sinks.scores[1][0].sum()
    for layer in model.model.language_model.layers:
        layer.self_attn.sinks.fill_(-1e4)
    without = reroute_fx.compile(model, config=config, backend="eager")(**given).routing
    assert total < without.scores[1][0].sum()
    assert with_sinks.scores[1][0].argsort().tolist() != without.scores[1][0].argsort().tolist()


def test_a_row_of_a_padded_batch_is_the_row_alone():
    routed = reroute_fx.compile(gpt_oss(), config=ROUTING, backend="eager")
    alone, batch = routed(**first_row()), routed(**prompts())
    torch.testing.assert_close(batch.logits[:1], alone.logits, atol=TOLERANCE, rtol=0)
    for layer in ROUTING.decision_layers:
        assert torch.equal(batch.routing.selected[layer][0], alone.routing.selected[layer][0])


@pytest.mark.full("6 s; captures another model")
def test_sinks_that_capture_does_not_find_are_refused(monkeypatch, no_traces):
    monkeypatch.setattr(attention_forms, "has_sinks", lambda decoder: False)
    with pytest.raises(UnsupportedModelError, match="attends in another way"):
        reroute_fx.compile(gpt_oss(), config=ROUTING, backend="eager")


@pytest.mark.full("30 s; compiled regions of other decoders are in the gate")
def test_compiled():
    model, given = gpt_oss(), prompts()
    compiled, eager = (reroute_fx.compile(model, config=ROUTING, backend=b) for b in ("inductor", "eager"))
    expect_same_answers(compiled, eager, given, 1e-4, **GREEDY)


@pytest.mark.full("60 s to 300 s for an artifact")
@pytest.mark.parametrize("format", ["onnx", "aot"])
def test_artifact(format, tmp_path):
    routed, given = reroute_fx.compile(gpt_oss(), config=ROUTING, backend="eager"), prompts()
    reroute_fx.export(
        routed, tmp_path / "a", format=format, limits=Limits(batch=4, length=64, image_tokens=32)
    )
    loaded = reroute_fx.load(tmp_path / "a")
    expect_same_answers(loaded, routed, given, 1e-4, **GREEDY)
