"""Decoders that are alike share a trace and what is made of it, each on its own weights; others don't."""

import functools
import gc
import weakref

import pytest
import torch
from suite_tiers import share
from tiny_models import PAD, llava_config, qwen_config, sharp
from transformers import LlavaForConditionalGeneration, Qwen2_5_VLForConditionalGeneration
from transformers.models.llama import modeling_llama

import reroute_fx
from reroute_fx import RoutingConfig, Savings
from reroute_fx.capture import capture_decoder, captured_decoder
from reroute_fx.capture.structure import structure_of
from reroute_fx.pipeline import DecoderPrograms

EVERYTHING = RoutingConfig((1,), (1.0,))
HALF = RoutingConfig((1,), (0.5,))
NOISE = 1e-4
"""Allowed difference of logits near 8. Other weights move them by 1e-1 and more."""

pytestmark = pytest.mark.usefixtures("no_gradients", "no_traces")


def llava(seed=0, layers=2, **text):
    config = llava_config(layers, pad_token_id=PAD)
    for name, value in text.items():
        setattr(config.text_config, name, value)
    model = sharp(LlavaForConditionalGeneration, config)
    random = torch.Generator().manual_seed(seed)
    for weight in model.model.language_model.parameters():
        weight.mul_(0.5 + torch.rand(1, generator=random))
    return model


def prompt():
    random = torch.Generator().manual_seed(1)
    ids = torch.tensor([[1, 7, *[50] * 16, 9, 11, 13]])
    pixels = torch.randn(1, 3, 16, 16, generator=random)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def assert_routed_as(model, inputs):
    routed = reroute_fx.compile(model, config=EVERYTHING, backend="eager")
    torch.testing.assert_close(routed(**inputs).logits, model(**inputs).logits, atol=NOISE, rtol=0)


def traces(*models):
    return [capture_decoder(model).trace for model in models]


def test_models_of_one_kind_share_a_trace_and_keep_their_weights():
    one, other = llava(0), llava(1)
    first, second = traces(one, other)
    assert first is second
    inputs = prompt()
    assert (one(**inputs).logits - other(**inputs).logits).abs().max() > 0.1
    for model in (one, other, one):
        assert_routed_as(model, inputs)
    captured = capture_decoder(other)
    weight = other.model.language_model.layers[0].mlp.up_proj.weight
    assert captured.program.state_dict["layers.0.mlp.up_proj.weight"] is weight


@pytest.mark.full("another family; its artifacts and programs are tested in the gate")
def test_positions_in_space_and_time():
    config = qwen_config(2, tokens_per_second=4)
    first, second = traces(*(sharp(Qwen2_5_VLForConditionalGeneration, config) for _ in range(2)))
    assert first is second


def change_config(model):
    model.model.language_model.config.rms_norm_eps = 0.1
    for module in model.model.language_model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.1


def change_attribute(model):
    model.model.language_model.layers[1].self_attn.scaling *= 3


def replace_activation(model):
    model.model.language_model.layers[0].mlp.act_fn = torch.nn.GELU()


def replace_forward(model):
    mlp = model.model.language_model.layers[1].mlp
    own = type(mlp).forward
    mlp.forward = lambda states: 2 * own(mlp, states)


def share_weights(model):
    layers = model.model.language_model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight


def share_modules(model):
    layers = model.model.language_model.layers
    layers[1].mlp = layers[0].mlp


CHANGES = [
    change_config,
    change_attribute,
    replace_activation,
    replace_forward,
    share_weights,
    share_modules,
]


@pytest.mark.parametrize(
    "change",
    share(CHANGES, [change_attribute], "each captures two models"),
    ids=lambda change: change.__name__,
)
def test_models_that_differ_are_traced_by_themselves(change):
    plain, changed = llava(), llava()
    change(changed)
    first, second = traces(plain, changed)
    assert first is not second
    assert_routed_as(changed, prompt())
    assert_routed_as(plain, prompt())


@pytest.mark.full("9 s each; models that differ are traced by themselves in the gate")
@pytest.mark.parametrize("change", [change_config, change_attribute], ids=lambda change: change.__name__)
def test_a_model_that_changed_since_is_traced_again(change):
    model = llava()
    assert_routed_as(model, prompt())
    change(model)
    assert_routed_as(model, prompt())


@pytest.mark.full("8 s; captures two models")
def test_a_function_that_was_replaced_since_is_noticed(monkeypatch):
    """Modules find it by its name in their module, so that nothing of the model tells."""
    (first,) = traces(llava())
    rotate = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(
        modeling_llama, "apply_rotary_pos_emb", lambda q, k, *rest, **named: rotate(2 * q, k, *rest, **named)
    )
    changed = llava()
    (second,) = traces(changed)
    assert second is not first
    assert_routed_as(changed, prompt())


@pytest.mark.full("8 s; captures two models")
def test_what_nobody_can_compare_is_not_shared():
    one, other = llava(), llava()
    for model in (one, other):
        model.model.language_model.layers[0].note = functools.partial(print, 1)
    assert structure_of(one.model.language_model) is None
    first, second = traces(one, other)
    assert first is not second
    assert_routed_as(other, prompt())


def test_plain_values_of_other_types_are_others():
    decoders = [llava().model.language_model for _ in range(3)]
    for decoder, value in zip(decoders, (1, 1.0, True), strict=True):
        decoder.layers[0].note = {"value": [value]}
    assert len(set(map(structure_of, decoders))) == 3


@pytest.mark.full("6 s")
def test_weights_die_with_their_model():
    model = llava()
    reroute_fx.compile(model, config=HALF, backend="eager")(**prompt())
    weight = weakref.ref(model.model.language_model.layers[0].mlp.up_proj.weight)
    del model
    gc.collect()
    assert weight() is None
    # The trace is still there.
    assert traces(llava(1))[0] in [kept.trace for kept in captured_decoder._alike.values()]


@pytest.mark.full("captures five models")
def test_kinds_that_were_used_longest_ago_make_room(monkeypatch):
    monkeypatch.setattr(captured_decoder, "_KINDS", 2)
    small, *_ = traces(llava(layers=1), llava(layers=2))
    assert traces(llava(layers=1)) == [small]
    traces(llava(layers=3))
    assert len(captured_decoder._alike) == 2
    assert traces(llava(layers=1)) == [small]


def test_programs_are_made_once():
    captured = capture_decoder(llava())
    one, other = DecoderPrograms(captured), DecoderPrograms(capture_decoder(llava(1)))
    graph = one.prompt(HALF)[0].graph
    assert one.prompt(RoutingConfig((1,), (0.5,)))[0].graph is graph
    program, report = other.prompt(HALF)
    assert program.graph is graph
    assert report.config == HALF
    assert one.following(HALF).graph is other.following(HALF).graph
    different = [
        one.prompt(EVERYTHING)[0],
        one.prompt(HALF, Savings(restore_in_place=False))[0],
        one.prompt(HALF, streams=True)[0],
    ]
    assert len({graph, *(program.graph for program in different)}) == 4


@pytest.mark.full("3 s; dumps are tested in passes/test_run_passes.py")
def test_each_pass_is_dumped_for_each_program(tmp_path, monkeypatch):
    captured = capture_decoder(llava())
    DecoderPrograms(captured).prompt(HALF)
    monkeypatch.setenv("REROUTE_FX_DUMP", str(tmp_path))
    DecoderPrograms(captured).prompt(HALF)
    assert {"FindLayers", "RouteStages"} <= {
        path.name.split("_", 1)[1].split(".")[0] for path in tmp_path.iterdir()
    }


@pytest.mark.full("15 s; compiles")
@pytest.mark.usefixtures("fresh_regions")
def test_another_tier_compiles_only_what_is_new():
    inputs, counts = prompt(), []
    for model, config in ((llava(), HALF), (llava(), RoutingConfig((1,), (0.25,))), (llava(1), HALF)):
        routed = reroute_fx.compile(model, config=config)
        eager = reroute_fx.compile(model, config=config, backend="eager")
        torch.testing.assert_close(routed(**inputs).logits, eager(**inputs).logits, atol=NOISE, rtol=0)
        counts.append(routed.report.compilations["prefill"])
    assert 0 < counts[0] == routed.model.language_model.prefill.distinct_regions
    assert counts[1:] == [0, 0]
