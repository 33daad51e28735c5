"""Visual features that are added inside the decoder: captured as addends, compacted, given to tokens that wait."""

import pytest
import torch
from artifacts import loaded_model
from by_hand import by_hand
from conversations import (
    BATCHES,
    DECISIONS,
    EVERYTHING,
    IMAGE,
    MIXED,
    NOISE,
    SINGLE,
    TEXT,
    batch,
    build,
    forward_and_steps,
    new_tokens,
    prompt,
    routed_model,
    unrouted_model,
)
from suite_tiers import share
from tiny_models import qwen3_config
from torch.export import Dim
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

import reroute_fx
from reroute_fx import Limits, RoutingConfig, UnsupportedModelError
from reroute_fx.capture import capture_decoder, text_decoder
from reroute_fx.capture.layer_features import find_layer_features
from reroute_fx.passes import MatchError, run_passes
from reroute_fx.passes.tensor_names import addend_input
from reroute_fx.pipeline import find_passes, route
from reroute_fx.runtime.buckets import pad_inputs
from reroute_fx.selection.row_plan import plan_rows

FAMILY = "qwen3"
ROUTING = RoutingConfig(DECISIONS, (0.5, 0.25))

pytestmark = pytest.mark.usefixtures("no_gradients", "one_thread")


def features_of(model, inputs):
    """What the model adds behind its first layers, ``[B, S, d]`` each, zero for text."""
    inner = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).deepstack_features
    is_visual = inputs["input_ids"] == IMAGE
    addends = []
    for features in inner:
        addends.append(torch.zeros(*is_visual.shape, features.shape[-1]))
        addends[-1][is_visual] = features
    return addends


def test_keeping_everything_is_the_unrouted_model_to_the_bit():
    inputs = batch(FAMILY, *SINGLE)
    model = unrouted_model(FAMILY)
    found = routed_model(FAMILY, EVERYTHING)(**inputs).logits
    assert torch.equal(found, model(**inputs).logits)


@pytest.mark.parametrize("rows", BATCHES)
def test_answers_of_the_unrouted_model(rows):
    inputs, options = batch(FAMILY, *BATCHES[rows]), {"max_new_tokens": 12, "do_sample": False}
    found = new_tokens(routed_model(FAMILY, EVERYTHING), inputs, **options)
    assert torch.equal(found, new_tokens(unrouted_model(FAMILY), inputs, **options))


def test_the_features_matter():
    """Without them the tests here would hold for a program that has lost them."""
    inputs, model = batch(FAMILY, *SINGLE), unrouted_model(FAMILY)
    logits = model(**inputs).logits
    model.model.visual.deepstack_visual_indexes = []
    try:
        assert (model(**inputs).logits - logits).abs().max() > 0.1
    finally:
        model.model.visual.deepstack_visual_indexes = [0, 1, 2]


@pytest.mark.parametrize("action", ["compact_route", "compact_route_stagewise"])
def test_tokens_that_wait_get_what_their_stage_adds(action):
    """Features come behind layers 0, 1 and 2; a token that waits in layers 1 and 2 comes back with both."""
    inputs, model = batch(FAMILY, *SINGLE), unrouted_model(FAMILY)
    routed = routed_model(FAMILY, RoutingConfig(DECISIONS, (0.5, 0.25), action))
    output = routed(**inputs, output_hidden_states=True)
    states, (_, second, third) = output.hidden_states, features_of(model, inputs)
    visual = (inputs["input_ids"][0] == IMAGE).nonzero().flatten()
    kept = output.routing.selected[1][0]
    waiting = visual[~torch.isin(torch.arange(len(visual)), kept)]
    assert len(waiting) == 8
    assert second[0, waiting].abs().min(dim=1).values.max() > 0
    assert torch.equal(states[2][0, waiting], states[1][0, waiting] + second[0, waiting])
    assert torch.equal(states[3][0, waiting], states[1][0, waiting] + second[0, waiting] + third[0, waiting])
    running = visual[kept]
    assert not torch.equal(
        states[3][0, running], states[1][0, running] + second[0, running] + third[0, running]
    )


@pytest.mark.parametrize(
    "action",
    share(
        ["compact_route_stagewise", "compact_route", "physical_delete"],
        ["compact_route_stagewise"],
        "2 s each; both ways to route are the same to the bit",
    ),
)
def test_routed_as_by_hand(action):
    """Of a padded batch each row with pictures is what a loop over the row alone says."""
    config, inputs = RoutingConfig(DECISIONS, (0.5, 0.25), action), batch(FAMILY, *MIXED)
    output, plain = routed_model(FAMILY, config)(**inputs), build(FAMILY)
    plain.set_attn_implementation({"text_config": "eager"})  # it returns maps
    for number in (0, 2):
        given = batch(FAMILY, MIXED[number])
        logits, kept = by_hand(plain, given, config, features_of(plain, given))
        assert {layer: rows[number].tolist() for layer, rows in output.routing.selected.items()} == kept
        is_text = given["input_ids"][0] != IMAGE
        found = output.logits[number, inputs["attention_mask"][number].bool()]
        torch.testing.assert_close(found[is_text], logits[0, is_text], atol=NOISE, rtol=0)


def test_both_actions_are_the_same_to_the_bit():
    inputs = batch(FAMILY, *MIXED)
    configs = [RoutingConfig(DECISIONS, (0.5, 0.25), a) for a in ("compact_route", "compact_route_stagewise")]
    first, second = (routed_model(FAMILY, config)(**inputs).logits for config in configs)
    assert torch.equal(first, second)


def test_keys_are_cached_before_they_are_repeated():
    """Two query heads share keys. What is cached fits the rows of a pool, which go by the config."""
    model, inputs = routed_model(FAMILY, ROUTING), batch(FAMILY, *SINGLE)
    text = model.config.text_config
    assert text.num_attention_heads == 2 * text.num_key_value_heads
    first, again = model(**inputs), model(**inputs)
    held = [states for layer in first.past_key_values.layers for states in (layer.keys, layer.values)]
    assert {states.shape[1] for states in held} == {text.num_key_value_heads}
    pool = reroute_fx.SlotPool(model, rows=2, capacity=64)
    pool.write(pool.claim(), first)
    token = torch.tensor([[5]])
    expected = model(input_ids=token, past_key_values=again.past_key_values).logits[0, -1]
    found = pool.step(torch.tensor([5, 5]), [True, False])[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_nothing_is_added_without_pictures():
    """As embeddings without pictures a prompt with visual tokens has no such features, in the model neither."""
    model, routed = unrouted_model(FAMILY), routed_model(FAMILY, EVERYTHING)
    inputs = batch(FAMILY, *SINGLE)
    ids = inputs["input_ids"]
    given = {"inputs_embeds": model.get_input_embeddings()(ids)}
    given["position_ids"] = torch.arange(ids.shape[1]).expand(3, 1, -1)
    found = routed(**given, visual_mask=ids == IMAGE).logits
    torch.testing.assert_close(found, model(**given).logits, atol=NOISE, rtol=0)


def test_hidden_states_are_those_of_the_stream():
    inputs = batch(FAMILY, *SINGLE)
    found = routed_model(FAMILY, EVERYTHING)(**inputs, output_hidden_states=True).hidden_states
    seen, decoder = [], unrouted_model(FAMILY).model.language_model
    hooks = [
        layer.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for layer in decoder.layers
    ]
    unrouted_model(FAMILY)(**inputs)
    for hook in hooks:
        hook.remove()
    for ours, theirs in zip(found, seen, strict=False):
        assert torch.equal(ours, theirs)


@pytest.mark.full("4 s each")
@pytest.mark.parametrize("rows", [SINGLE, MIXED, TEXT], ids=["single", "padded", "text"])
def test_without_the_model_class(rows):
    """Tower, positions and features of an artifact, its programs run as they are."""
    loaded, routed = loaded_model(FAMILY), routed_model(FAMILY)
    inputs = batch(FAMILY, *rows)
    found, expected = (forward_and_steps(each, inputs, [9, 10]) for each in (loaded, routed))
    is_token = torch.cat([inputs["attention_mask"], torch.ones(len(rows), 2)], dim=1).bool()
    torch.testing.assert_close(found[is_token], expected[is_token], atol=NOISE, rtol=0)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    assert torch.equal(new_tokens(loaded, inputs, **options), new_tokens(routed, inputs, **options))


def test_layers_know_what_they_add():
    captured = capture_decoder(unrouted_model(FAMILY))
    graph, _ = run_passes(captured.program, find_passes(4))
    names = [[node.name for node in layer.addends] for layer in graph.layers]
    assert names == [["addend_0"], ["addend_1"], ["addend_2"], []]
    plain, _ = run_passes(capture_decoder(unrouted_model("qwen")).program, find_passes(4))
    assert [layer.addends for layer in plain.layers] == [()] * 4


@pytest.mark.full("10 s; captures another model")
def test_more_features_than_layers():
    """The model leaves those out that no layer is there for."""
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(qwen3_config(2, 0.5, patch_size=4)).eval()
    assert find_layer_features(model, text_decoder(model)).layers == (0, 1)
    inputs = batch(FAMILY, *SINGLE)
    routed = reroute_fx.compile(model, config=RoutingConfig((1,), (1.0,)), backend="eager")
    assert torch.equal(routed(**inputs).logits, model(**inputs).logits)


@pytest.mark.full("11 s; captures another model")
def test_a_decoder_that_adds_in_another_way_is_refused(monkeypatch):
    original = Qwen3VLTextModel._deepstack_process
    monkeypatch.setattr(
        Qwen3VLTextModel,
        "_deepstack_process",
        lambda self, h, mask, features: original(self, h, mask, 2 * features),
    )
    with pytest.raises(UnsupportedModelError, match="attends in another way"):
        reroute_fx.compile(build(FAMILY), config=ROUTING, backend="eager")


def test_a_method_that_reduces_pictures_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"nuwa.*doesn't fit"):
        reroute_fx.compile(build(FAMILY), method="nuwa", tier=128, backend="eager")


@pytest.mark.full("9 s")
def test_positions_in_place_can_be_decomposed_by_hand():
    """The way that the error shows to those who export themselves."""
    decoder = text_decoder(build(FAMILY))
    decoder.config.use_cache = False

    class Exported(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = decoder

        def forward(self, inputs_embeds, position_ids):
            return self.decoder(inputs_embeds=inputs_embeds, position_ids=position_ids).last_hidden_state

    inputs = {
        "inputs_embeds": torch.zeros(2, 9, 32),
        "position_ids": torch.arange(9).expand(3, 2, 9).contiguous(),
    }
    sizes = {
        "inputs_embeds": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC},
        "position_ids": {1: Dim.DYNAMIC, 2: Dim.DYNAMIC},
    }
    program = torch.export.export(Exported(), (), inputs, dynamic_shapes=sizes)
    with pytest.raises(
        MatchError, match=r"writes into memory that other values share.*run_decompositions\(\)"
    ):
        route(program, ROUTING, num_layers=4)
    _, report = route(program.run_decompositions({}), ROUTING, num_layers=4)
    assert report.num_layers == 4


def test_addends_are_padded_as_embeddings():
    is_visual = torch.zeros(1, 20, dtype=torch.bool)
    is_visual[:, 2:18] = True
    plan = plan_rows(ROUTING, is_visual, [20], [[16]])
    embeds = torch.ones(1, 20, 4)
    padded = pad_inputs({"inputs_embeds": embeds, addend_input(1): 2 * embeds, **plan.inputs})
    assert padded["addend_1"].shape == padded["inputs_embeds"].shape
    assert padded["addend_1"].sum() == 2 * embeds.sum()
    assert torch.equal(padded["addend_1"][:, :20], 2 * embeds)


@pytest.mark.full("60 s; the gate compiles regions of other decoders")
@pytest.mark.parametrize("rows", BATCHES)
def test_compiled(rows):
    inputs = batch(FAMILY, *BATCHES[rows])
    compiled = reroute_fx.compile(unrouted_model(FAMILY), config=ROUTING)
    found, expected = (
        forward_and_steps(each, inputs, [9, 10]) for each in (compiled, routed_model(FAMILY, ROUTING))
    )
    is_token = torch.cat([inputs["attention_mask"], torch.ones(len(found), 2)], dim=1).bool()
    torch.testing.assert_close(found[is_token], expected[is_token], atol=NOISE, rtol=0)


@pytest.mark.full("120 s to 300 s for an artifact")
@pytest.mark.parametrize("format", ["onnx", "aot"])
def test_artifact(format, tmp_path):
    routed = routed_model(FAMILY, ROUTING)
    reroute_fx.export(
        routed, tmp_path / "a", format=format, limits=Limits(batch=9, length=96, image_tokens=32)
    )
    loaded = reroute_fx.load(tmp_path / "a")
    for rows in (SINGLE, MIXED, TEXT):
        inputs = batch(FAMILY, *rows)
        found, expected = (forward_and_steps(each, inputs, [9, 10]) for each in (loaded, routed))
        is_token = torch.cat([inputs["attention_mask"], torch.ones(len(rows), 2)], dim=1).bool()
        torch.testing.assert_close(found[is_token], expected[is_token], atol=5 * NOISE, rtol=0)
        options = {"max_new_tokens": 12, "do_sample": False}
        assert torch.equal(new_tokens(loaded, inputs, **options), new_tokens(routed, inputs, **options))


def test_prompts_differ_by_their_pictures():
    routed = routed_model(FAMILY, ROUTING)
    first, second = (routed(**batch(FAMILY, prompt(name, 9, 11))).logits[:, -1] for name in (7, 9))
    assert (first - second).abs().max() > 0.1
