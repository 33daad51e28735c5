"""Layers that see a window of the tokens: masks of stages come from where tokens were, not from where they lie."""

import functools

import pytest
import torch
from conversations import ACTIONS, GREEDY, expect_same_answers
from plain_decoder import PlainDecoder
from suite_tiers import share
from tiny_models import IMAGE, TEXT, VISION, sharp
from transformers import (
    CLIPVisionConfig,
    Cohere2Config,
    Exaone4Config,
    GptOssConfig,
    GraniteSWAConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MinistralConfig,
    MistralConfig,
)

import reroute_fx
from reroute_fx import Limits, RoutingConfig
from reroute_fx.capture import capture_decoder
from reroute_fx.passes import Reach, run_passes
from reroute_fx.pipeline import find_passes
from reroute_fx.tuning.divergence import Router

WINDOW = 8
KINDS = ("sliding_attention", "full_attention", "sliding_attention")
SIZES = {**TEXT, "num_hidden_layers": 3, "head_dim": 8, "sliding_window": WINDOW}
MIXED = {**SIZES, "layer_types": list(KINDS)}
DECISIONS = (1, 2)
EVERYTHING = RoutingConfig(DECISIONS, (1.0, 1.0))
TOLERANCE = 1e-5
"""Of logits near 4; a token more or less in a window moves them by 1e-2 and more."""

pytestmark = pytest.mark.usefixtures("no_gradients", "one_thread")


def over(text):
    config = LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_index=IMAGE)
    return sharp(LlavaForConditionalGeneration, config)


def with_sinks(text):
    model = over(text)
    for layer in model.model.language_model.layers:
        layer.self_attn.sinks.copy_(torch.linspace(-2, 4, 4))
    return model


BUILD = {
    "Ministral": lambda: over(MinistralConfig(**MIXED)),
    "Mistral": lambda: over(MistralConfig(**SIZES)),
    "Cohere 2": lambda: over(Cohere2Config(**MIXED)),
    "Exaone 4": lambda: over(Exaone4Config(**MIXED)),
    "GPT-OSS": lambda: with_sinks(GptOssConfig(**MIXED, num_local_experts=4)),
    "Granite SWA": lambda: with_sinks(GraniteSWAConfig(**MIXED)),
}


@functools.cache
def built(family):
    with torch.no_grad():
        return BUILD[family]()


@functools.cache
def routed_model(action):
    config = RoutingConfig(DECISIONS, (0.5, 0.25), action)
    return reroute_fx.compile(built("Ministral"), config=config, backend="eager")


def prompts():
    """Two rows of different lengths, padded on the left; both are longer than two windows."""
    ids = torch.tensor([[1, 7, *[IMAGE] * 16, 9, 11, 13], [0, 0, 3, *[IMAGE] * 16, 5, 6]])
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": (ids != 0).long()}


def row(number):
    given = prompts()
    is_token = given["attention_mask"][number].bool()
    return {
        "input_ids": given["input_ids"][number, is_token][None],
        "pixel_values": given["pixel_values"][number : number + 1],
    }


OTHERS = "5 s each; tests/test_groups.py has a decoder with windows"


@pytest.mark.parametrize("family", share(BUILD, [], OTHERS))
def test_keeping_everything_is_the_unrouted_model(family):
    model, given = built(family), prompts()
    routed = reroute_fx.compile(model, config=EVERYTHING, backend="eager")
    expect_same_answers(routed, model, given, TOLERANCE, **GREEDY)


@pytest.mark.parametrize("action", share(ACTIONS, ["compact_route_stagewise"], "4 s"))
def test_routed_as_by_a_plain_loop(action):
    """Of a padded batch each row is what loops over the row alone say: logits, selections and 12 tokens."""
    model, given = built("Ministral"), prompts()
    routed = routed_model(action)
    output, answers = routed(**given), routed.generate(**given, **GREEDY)
    windows = [WINDOW if kind == "sliding_attention" else None for kind in KINDS]
    plain = PlainDecoder(
        model,
        {1: 8, 2: 4},
        previous=False,
        deletes=action == "physical_delete",
        contiguous=False,
        windows=windows,
    )
    for number in range(2):
        ids = row(number)["input_ids"][0]
        features = model.get_image_features(pixel_values=row(number)["pixel_values"]).pooler_output[0]
        embeds = model.get_input_embeddings()(ids)
        embeds[ids == IMAGE] = features
        expected = plain.answer(embeds, (ids == IMAGE).nonzero().flatten().tolist(), 12)
        torch.testing.assert_close(
            output.logits[number, -1].double(), expected.logits, atol=TOLERANCE, rtol=0
        )
        assert {
            layer: rows[number].tolist() for layer, rows in output.routing.selected.items()
        } == expected.kept
        assert answers[number, -12:].tolist() == expected.tokens


def test_what_waits_takes_up_room_in_windows():
    """A window over the compact rows of a stage would reach farther back."""
    output = routed_model("compact_route_stagewise")(**row(0))
    (index,) = output.past_key_values.indices.values()  # the stage from layer 1 on sees everything
    kept = output.routing.selected[2][0] + 2
    assert index[0].tolist() == [0, 1, *kept.tolist(), 18, 19, 20]
    assert (index[0] > 20 - WINDOW).sum() < WINDOW < len(index[0])
    output.past_key_values.batch_repeat_interleave(2)
    (twice,) = output.past_key_values.indices.values()
    assert torch.equal(twice, index.expand(2, -1))


def test_windows_are_found():
    graph, results = run_passes(capture_decoder(built("Ministral")).program, find_passes(3))
    assert graph.reaches == (Reach(WINDOW), Reach(), Reach(WINDOW))
    (proof,) = (result for result in results if result.name == "ProveCausal")
    assert "2 with a window of 8 tokens" in proof.detail


@pytest.mark.full("5 s; tests/tuning has decoders without windows")
@pytest.mark.parametrize("decisions", [(1,), (2,), (1, 2)])
def test_tuning_continues_as_the_compiled_model(decisions):
    """One program continues all configurations, in which every layer may have cached other tokens."""
    model, given = built("Ministral"), prompts()
    config = RoutingConfig(decisions, (0.5, 0.25)[: len(decisions)])
    router = Router(model, reroute_fx.compile(model, method="none", backend="eager"))
    turn = torch.arange(20, 32).expand(2, -1)
    mask = torch.cat([given["attention_mask"], torch.ones_like(turn)], dim=1)
    found, expected = (
        each(input_ids=turn, attention_mask=mask, past_key_values=each(**given).past_key_values).logits
        for each in (router.routed(config), reroute_fx.compile(model, config=config, backend="eager"))
    )
    assert torch.equal(found, expected)


@pytest.mark.full("60 s; the gate compiles regions of other decoders")
@pytest.mark.parametrize("family", ["Ministral", "GPT-OSS"])
def test_compiled(family):
    config, given = RoutingConfig(DECISIONS, (0.5, 0.25)), prompts()
    compiled, eager = (
        reroute_fx.compile(built(family), config=config, backend=b) for b in ("inductor", "eager")
    )
    expect_same_answers(compiled, eager, given, 1e-4, **GREEDY)


@pytest.mark.full("60 s to 300 s for an artifact")
@pytest.mark.parametrize("format", ["onnx", "aot"])
def test_artifact(format, tmp_path):
    """The cache of an artifact keeps where its tokens were, too."""
    routed, given = routed_model("compact_route_stagewise"), prompts()
    reroute_fx.export(
        routed, tmp_path / "a", format=format, limits=Limits(batch=4, length=64, image_tokens=32)
    )
    loaded = reroute_fx.load(tmp_path / "a")
    expect_same_answers(loaded, routed, given, 1e-4, **GREEDY)
