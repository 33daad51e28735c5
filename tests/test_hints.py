"""What a refusal advises is done, and no other refusal follows."""

import pytest
import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from suite_tiers import share
from tiny_models import PAD, llava_config, qwen_config, sharp
from transformers import LlavaForConditionalGeneration, Qwen2_5_VLForConditionalGeneration

import reroute_fx
from reroute_fx import RoutingConfig, UnsupportedModelError

CONFIG = RoutingConfig((1,), (0.5,))
CONTIGUOUS = RoutingConfig((1,), (0.5,), positions="contiguous")


def llava():
    return sharp(LlavaForConditionalGeneration, llava_config(2, pad_token_id=PAD))


def with_frequencies(kind):
    config = llava_config(2, pad_token_id=PAD)
    config.text_config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    return sharp(LlavaForConditionalGeneration, config)


def prompted():
    model = llava()
    model.config.num_attention_heads, model.config.num_hidden_layers = 4, 2
    return get_peft_model(model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3))


def hooked():
    model = llava()
    model.hook = model.model.language_model.layers[0].register_forward_hook(lambda *_: None)
    return model


def without_hook(model):
    model.hook.remove()
    return model


def packed():
    model = llava()
    model.config.quantization_config = {"quant_method": "gptq"}
    return model


def with_another_forward():
    model = llava()
    decoder = model.model.language_model
    decoder.forward = torch.compile(decoder.forward, backend="eager")
    return model


def with_its_own_forward(model):
    del model.model.language_model.forward
    return model


HINTS = {
    # The refused model, what the refusal advises, and the model that does so.
    "frequencies": (
        lambda: with_frequencies("dynamic"),
        r"'linear'.*Set rope_parameters of the text config to one",
        lambda _: with_frequencies("linear"),
    ),
    "prompts": (prompted, r"Pass model\.get_base_model\(\) to do", lambda model: model.get_base_model()),
    "compiled": (
        lambda: torch.compile(llava()),
        r"Pass the model that torch\.compile was given",
        lambda model: model._orig_mod,
    ),
    "hook": (hooked, r"Remove it", without_hook),
    "packed": (packed, r"Load the model without quantization_config", lambda _: llava()),
    "forward": (
        with_another_forward,
        r"Take it off \(`del model\.model\.language_model\.forward`",
        with_its_own_forward,
    ),
    "training": (lambda: llava().train(), r"Call model\.eval\(\) first", lambda model: model.eval()),
}


@pytest.mark.parametrize(
    "name",
    share(HINTS, ["compiled", "hook", "packed", "forward"], "3 s each to trace, or in the gate elsewhere"),
)
def test_what_a_refusal_advises_is_taken(name):
    build, advice, follow = HINTS[name]
    model = build()
    with pytest.raises(UnsupportedModelError, match=advice):
        reroute_fx.compile(model, config=CONFIG, backend="eager")
    assert reroute_fx.compile(follow(model), config=CONFIG, backend="eager").report.num_layers == 2


@pytest.mark.full("4 s; other hints are followed in the gate")
def test_the_positions_that_a_refusal_advises_are_taken():
    model = sharp(Qwen2_5_VLForConditionalGeneration, qwen_config(2))
    with pytest.raises(reroute_fx.RerouteError, match=r"Use positions='original'"):
        reroute_fx.compile(model, config=CONTIGUOUS, backend="eager")
    original = RoutingConfig((1,), (0.5,), positions="original")
    assert reroute_fx.compile(model, config=original, backend="eager").report.num_layers == 2
