"""Models that come in a wrapper, with adapters, or with packed weights."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from suite_tiers import share
from tiny_models import PAD, llava_config, sharp
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
from transformers import LlavaForConditionalGeneration, TorchAoConfig

import reroute_fx
from reroute_fx import RoutingConfig, UnsupportedModelError

EVERYTHING = RoutingConfig((1,), (1.0,))
NOISE = 1e-4

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def model():
    return sharp(LlavaForConditionalGeneration, llava_config(2, pad_token_id=PAD))


@pytest.fixture(scope="module")
def inputs():
    ids = torch.tensor([[1, 7, *[50] * 16, 9, 11, 13]])
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def with_lora(model):
    options = LoraConfig(target_modules=r".*language_model.*\.(q_proj|down_proj)", init_lora_weights=False)
    return get_peft_model(model, options).eval()


class TestPeft:
    def test_adapters_of_a_peft_model_run(self, model, inputs):
        plain = model(**inputs).logits
        adapted = with_lora(model)
        routed = reroute_fx.compile(adapted, config=EVERYTHING, backend="eager")
        expected = adapted(**inputs).logits
        torch.testing.assert_close(routed(**inputs).logits, expected, atol=NOISE, rtol=0)
        assert (expected - plain).abs().max() > 100 * NOISE
        assert isinstance(routed, LlavaForConditionalGeneration)
        assert routed.report.source == "base model of PeftModel, adapters default"
        assert "Model: base model of PeftModel, adapters default." in str(routed.report)
        assert reroute_fx.inspect(adapted, config=EVERYTHING).source == routed.report.source

    @pytest.mark.full("4 s; merged weights are plain weights")
    def test_merged_adapters_run(self, model, inputs):
        merged = with_lora(model).merge_and_unload()
        routed = reroute_fx.compile(merged, config=EVERYTHING, backend="eager")
        torch.testing.assert_close(routed(**inputs).logits, merged(**inputs).logits, atol=NOISE, rtol=0)
        assert routed.report.source == ""

    @pytest.mark.full("7 s each; that adapters run is in the gate")
    @pytest.mark.parametrize(
        "change",
        share(
            ["merge_adapter", "disable_adapter_layers", "set_adapter"],
            ["set_adapter"],
            "6 s each; all are seen in the adapters' state",
        ),
    )
    def test_another_state_of_the_adapters_is_noticed(self, model, inputs, change):
        adapted = with_lora(model)
        options = LoraConfig(target_modules=r".*language_model.*\.q_proj", init_lora_weights=False)
        adapted.add_adapter("other", options)
        routed = reroute_fx.compile(adapted, config=EVERYTHING, backend="eager")
        routed(**inputs)
        if change == "disable_adapter_layers":
            adapted.base_model.disable_adapter_layers()
        elif change == "set_adapter":
            adapted.set_adapter("other")
        else:
            adapted.merge_adapter()
        with pytest.raises(reroute_fx.InputError, match=r"is no longer what it was.*another adapter"):
            routed(**inputs)
        again = reroute_fx.compile(adapted, config=EVERYTHING, backend="eager")
        torch.testing.assert_close(again(**inputs).logits, adapted(**inputs).logits, atol=NOISE, rtol=0)

    def test_prompts_in_front_of_the_models_are_refused(self, model):
        options = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
        model.config.num_attention_heads, model.config.num_hidden_layers = 4, 2
        prompted = get_peft_model(model, options)
        with pytest.raises(
            UnsupportedModelError, match=r"adapters \['default'\] are prompts in front of the model's"
        ):
            reroute_fx.compile(prompted, config=EVERYTHING)


def test_what_torch_compile_returned_is_refused(model):
    with pytest.raises(
        UnsupportedModelError, match=r"what torch\.compile returned; expected the model itself"
    ):
        reroute_fx.compile(torch.compile(model), config=EVERYTHING)


@pytest.mark.parametrize("backend", share(["eager", "inductor"], ["eager"], "30 s each"))
@pytest.mark.parametrize(
    "config", share([Int8WeightOnlyConfig, Float8WeightOnlyConfig], [Int8WeightOnlyConfig], "10 s each")
)
def test_weights_packed_by_torchao_run(model, inputs, config, backend):
    plain = model(**inputs).logits
    unpacked = reroute_fx.inspect(model, config=RoutingConfig((1,), (0.5,)))
    quantize_(model.model.language_model, config())
    routed = reroute_fx.compile(model, config=EVERYTHING, backend=backend)
    expected = model(**inputs).logits
    torch.testing.assert_close(routed(**inputs).logits, expected, atol=NOISE, rtol=0)
    assert (expected - plain).abs().max() > 10 * NOISE
    half = reroute_fx.compile(model, config=RoutingConfig((1,), (0.5,)), backend="eager")
    assert half.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
    assert (half.report.uncounted, half.report.layers) == ((), unpacked.layers)


@pytest.mark.full("3 s")
def test_a_model_that_names_torchao_in_its_config_is_taken(model):
    model.config.quantization_config = TorchAoConfig(Int8WeightOnlyConfig())
    assert reroute_fx.inspect(model, config=EVERYTHING).num_layers == 2


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "mxfp4"])
def test_packed_weights_are_refused_by_name(model, method):
    model.config.quantization_config = {"quant_method": method}
    with pytest.raises(
        UnsupportedModelError, match=rf"weights packed by '{method}', which torch\.export can't capture"
    ):
        reroute_fx.compile(model, config=EVERYTHING)
