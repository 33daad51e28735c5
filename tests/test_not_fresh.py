"""Models that something happened to before they were compiled, or after: right, or refused by name."""

import copy
import pickle

import pytest
import torch
from suite_tiers import share
from tiny_models import PAD, llava_config, qwen_config, sharp
from transformers import (
    AutoModelForImageTextToText,
    LlavaForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
)

import reroute_fx
from reroute_fx import InputError, RerouteError, RoutingConfig, UnsupportedModelError
from reroute_fx.capture import capture_decoder, captured_decoder

EVERYTHING = RoutingConfig((1,), (1.0,))
ROUTING = RoutingConfig((1,), (0.5,))
NOISE = 1e-4
"""Allowed difference of logits near 8: a hundred roundings in another order.

Other weights move them by 1e-1 and more.
"""

pytestmark = pytest.mark.usefixtures("no_gradients")


def compile(model, config=EVERYTHING):
    return reroute_fx.compile(model, config=config, backend="eager")


@pytest.fixture
def model():
    return sharp(LlavaForConditionalGeneration, llava_config(2, pad_token_id=PAD))


@pytest.fixture(scope="module")
def pair():
    """A model and its routed one, for what leaves both as they are."""
    model = sharp(LlavaForConditionalGeneration, llava_config(2, pad_token_id=PAD))
    return model, compile(model)


@pytest.fixture(scope="module")
def inputs():
    random = torch.Generator().manual_seed(1)
    ids = torch.tensor([[1, 7, *[50] * 16, 9, 11, 13]])
    pixels = torch.randn(1, 3, 16, 16, generator=random)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def assert_same(routed, model, inputs):
    torch.testing.assert_close(routed(**inputs).logits, model(**inputs).logits, atol=NOISE, rtol=0)


PLACES = ["", "model", "model.language_model"]
OTHER_PART = pytest.mark.full("3 s each; the gate has another part of the model")


class TestReplacedForwards:
    @pytest.mark.parametrize("place", PLACES)
    def test_a_forward_of_an_instance_is_refused(self, model, place):
        module = model.get_submodule(place)
        module.forward = torch.compile(module.forward)
        name = f"model.{place}" if place else "model"
        with pytest.raises(
            UnsupportedModelError, match=rf"^{name}\.forward was replaced on the instance.*compile again"
        ):
            compile(model)

    @pytest.mark.parametrize("place", share(PLACES, ["model"], "each captures a model"))
    def test_a_forward_that_was_put_back_is_taken(self, model, inputs, place):
        module = model.get_submodule(place)
        module.forward = torch.compile(module.forward)
        del module.forward
        assert_same(compile(model), model, inputs)

    def test_hooks_of_accelerate_are_refused(self, model):
        from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

        add_hook_to_module(model.model.language_model, ModelHook())
        with pytest.raises(
            UnsupportedModelError, match=r"model\.model\.language_model\.forward was replaced.*accelerate"
        ):
            compile(model)
        remove_hook_from_module(model.model.language_model)
        compile(model)

    def test_a_wrapped_decoder_is_refused(self, model):
        model.model.language_model = torch.compile(model.model.language_model)
        with pytest.raises(
            UnsupportedModelError, match="text decoder is a OptimizedModule; expected the Hugging Face"
        ):
            compile(model)

    def test_a_model_that_is_compiled_in_place_is_routed(self, model, inputs):
        model.compile(backend="eager")
        routed = compile(model, ROUTING)
        assert routed(**inputs).routing.selected[1][0].shape == (8,)

    def test_a_layer_with_a_forward_of_its_own_is_captured_with_it(self, model, inputs):
        mlp = model.model.language_model.layers[1].mlp
        own = type(mlp).forward
        mlp.forward = lambda states: 2 * own(mlp, states)
        assert_same(compile(model), model, inputs)

    @pytest.mark.parametrize(
        ("place", "message"),
        [
            ("model", "ended without running the routed decoder"),
            pytest.param("model.language_model", "routed.forward is no longer", marks=OTHER_PART),
        ],
    )
    def test_a_prompt_that_ends_without_its_routing_raises(self, model, inputs, place, message):
        routed = compile(model)
        routed.get_submodule(place).forward = model.get_submodule(place).forward
        with pytest.raises(RerouteError, match=message):
            routed(**inputs)
        del routed.get_submodule(place).forward
        assert_same(routed, model, inputs)

    def test_hooks_that_would_not_run_are_refused(self, model, inputs):
        routed = compile(model)
        routed.model.language_model.layers[1].register_forward_hook(lambda *_: None)
        with pytest.raises(InputError, match=r"routed\.layers\.1 got a forward hook, which does not run"):
            routed(**inputs)
        model.model.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: None)
        with pytest.raises(
            UnsupportedModelError, match=r"decoder\.layers\.0\.mlp has a forward hook.*would not run"
        ):
            compile(model)

    @pytest.mark.full("3 s")
    def test_hooks_of_transformers_are_no_reason(self, model, inputs):
        expected = model(**inputs, output_hidden_states=True)
        assert len(expected.hidden_states) == 3
        assert_same(compile(model), model, inputs)

    @pytest.mark.parametrize("part", ["model", pytest.param("model.language_model", marks=OTHER_PART)])
    def test_a_part_that_is_called_by_itself_raises(self, model, inputs, part):
        routed = compile(model)
        given = inputs if part == "model" else {"input_ids": torch.tensor([[1, 5, 6]])}
        with pytest.raises(InputError, match=r"called by itself and reached its decoder.*Call that"):
            routed.get_submodule(part)(**given)
        assert_same(routed, model, inputs)


def replace_a_projection(model):
    old = model.model.language_model.layers[1].mlp.up_proj
    new = torch.nn.Linear(old.in_features, old.out_features, bias=False)
    model.model.language_model.layers[1].mlp.up_proj = new


def assign_weights(model):
    state = {name: tensor.flip(0) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def inject_lora(model):
    from peft import LoraConfig, inject_adapter_in_model

    options = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    inject_adapter_in_model(options, model)


def add_adapter(model):
    from peft import LoraConfig

    model.add_adapter(LoraConfig(target_modules=["v_proj"], init_lora_weights=False))


def cast(model):
    model.to(torch.float64)


SWAPS = [replace_a_projection, assign_weights, inject_lora, add_adapter]
LIKE = "each captures a model; another swap of the same kind is in the gate"


class TestSwappedParts:
    @pytest.mark.parametrize("swap", share(SWAPS, [inject_lora], LIKE))
    def test_a_second_compile_has_the_new_ones(self, model, inputs, swap):
        before = compile(model)(**inputs).logits
        swap(model)
        assert_same(compile(model), model, inputs)
        assert (model(**inputs).logits - before).abs().max() > 100 * NOISE

    def test_a_second_compile_has_the_new_config(self, model, inputs):
        first = compile(model)(**inputs).logits
        model.config.text_config.rms_norm_eps = 0.5
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = 0.5
        assert_same(compile(model), model, inputs)
        assert (model(**inputs).logits - first).abs().max() > 100 * NOISE

    def test_an_unchanged_model_is_captured_once(self, model, monkeypatch):
        first = capture_decoder(model)
        monkeypatch.setattr(captured_decoder, "_export", lambda _: pytest.fail("captured again"))
        assert capture_decoder(model) is first

    @pytest.mark.parametrize("swap", share([*SWAPS, cast], [replace_a_projection, cast], LIKE))
    def test_a_routed_model_notices_swaps_in_the_original(self, model, inputs, swap):
        routed = compile(model)
        routed(**inputs)
        swap(model)
        for call in (lambda: routed(**inputs), lambda: routed.generate(**inputs, max_new_tokens=2)):
            with pytest.raises(InputError, match=r"^model\..* is no longer what it was.*compile again"):
                call()

    @pytest.mark.parametrize("swap", share(SWAPS, [assign_weights], LIKE))
    def test_a_routed_model_notices_swaps_in_itself(self, model, inputs, swap):
        routed = compile(model)
        expected = model(**inputs).logits
        swap(routed)
        with pytest.raises(InputError, match=r"^routed\..* is no longer what it was.*compile again"):
            routed(**inputs)
        assert torch.equal(model(**inputs).logits, expected)

    def test_steps_notice_too(self, model, inputs):
        routed = compile(model)
        cache = routed(**inputs).past_key_values
        replace_a_projection(model)
        with pytest.raises(InputError, match="up_proj is no longer what it was"):
            routed(input_ids=torch.tensor([[3]]), past_key_values=cache)

    def test_weights_that_are_written_in_place_are_followed(self, model, inputs):
        routed = compile(model)
        state = {name: tensor.flip(0) for name, tensor in model.state_dict().items()}
        model.load_state_dict(state)
        assert_same(routed, model, inputs)

    def test_an_artifact_is_not_written_from_swapped_parts(self, model, tmp_path):
        routed = compile(model)
        replace_a_projection(model)
        with pytest.raises(InputError, match="up_proj is no longer what it was"):
            reroute_fx.export(routed, tmp_path / "artifact")
        assert not (tmp_path / "artifact").exists()


class TestTheOriginalStaysAsItWas:
    def test_hooks_are_its_own(self, model, inputs):
        seen = []
        model.register_forward_hook(lambda *_: seen.append("original"))
        routed = compile(model)
        routed.register_forward_hook(lambda *_: seen.append("routed"))
        routed.lm_head.register_forward_hook(lambda *_: seen.append("head"))
        routed.model.language_model.register_forward_hook(lambda *_: seen.append("decoder"))
        model(**inputs)
        assert seen == ["original"]
        routed(**inputs)
        # Hooks that were there are copied, as all else of a module.
        assert seen[1:] == ["decoder", "head", "original", "routed"]

    def test_a_saved_routed_model_loads_as_the_original(self, model, inputs, tmp_path):
        routed = compile(model)
        before = model.config.to_dict()
        routed.save_pretrained(tmp_path)
        assert model.config.to_dict() == before
        assert "Routed" not in (tmp_path / "config.json").read_text()
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
        assert type(loaded) is LlavaForConditionalGeneration
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)

    @pytest.mark.parametrize(
        "move", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to("meta")]
    )
    def test_it_is_not_moved_or_cast(self, pair, inputs, move):
        model, routed = pair
        with pytest.raises(InputError, match=r"can't be moved or cast.*compile it again"):
            move(routed)
        assert model.dtype is torch.float32
        assert_same(routed, model, inputs)
        assert routed.to("cpu") is routed
        assert routed.to(torch.float32) is routed

    def test_configs_are_its_own(self, model):
        routed = compile(model)
        routed.generation_config.max_new_tokens = 3
        routed.config.text_config.use_cache = False
        assert model.generation_config.max_new_tokens is None
        assert model.config.text_config.use_cache

    def test_modes_are_its_own(self, model):
        routed = compile(model)
        model.train()
        assert not any(module.training for module in routed.modules())
        with pytest.raises(InputError, match="inference only"):
            routed.train()

    def test_refuses_to_resize_embeddings(self, pair):
        model, routed = pair
        with pytest.raises(InputError, match=r"resize_token_embeddings.*compile it again"):
            routed.resize_token_embeddings(70)
        assert model.get_input_embeddings().num_embeddings == 64

    @pytest.mark.parametrize("clone", [pickle.dumps, copy.deepcopy, copy.copy])
    def test_refuses_to_be_pickled_or_copied(self, pair, clone):
        with pytest.raises(InputError, match=r"can't be pickled or copied.*reroute_fx\.export"):
            clone(pair[1])

    def test_gradients_are_not_half_there(self, pair, inputs):
        with torch.enable_grad():
            assert not pair[1](**inputs).logits.requires_grad

    @pytest.mark.full("4 s")
    def test_rope_offsets_are_its_own(self):
        model = sharp(Qwen2_5_VLForConditionalGeneration, qwen_config(2))
        routed = compile(model)
        model.model.rope_deltas = torch.tensor([[3]])
        routed(input_ids=torch.tensor([[1, 5, 6]]))
        assert model.model.rope_deltas.tolist() == [[3]]


def test_what_cannot_be_copied_is_named(model):
    model.model.language_model.attached = (x for x in "generator")
    with pytest.raises(UnsupportedModelError, match=r"holds something that can't be copied.*generator"):
        compile(model)


def test_a_copy_is_captured_apart():
    torch.manual_seed(0)
    one = LlavaForConditionalGeneration(llava_config(2)).eval()
    two = copy.deepcopy(one)
    assert capture_decoder(one) is not capture_decoder(two)
