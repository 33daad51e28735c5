"""The routed model as a drop-in, and the calls it refuses."""

import copy

import pytest
import torch
from conversations import Collector
from tiny_models import llava_config
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    StaticCache,
)

import reroute_fx
from reroute_fx import (
    ConfigError,
    InputError,
    MatchError,
    RoutedModel,
    RoutingConfig,
    UnsupportedModelError,
)


def tiny_llava():
    """A LLaVA of 8 layers with 16 visual tokens; 50 is the image token."""
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(llava_config(8)).eval()


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


@pytest.fixture(scope="module")
def routed(model):
    return reroute_fx.compile(model, tier=0.4, backend="eager")


@pytest.fixture
def inputs():
    random = torch.Generator().manual_seed(1)
    ids = torch.cat([torch.tensor([1, 7]), torch.full((16,), 50), torch.tensor([9, 11, 13])])[None]
    pixels = torch.randn(1, 3, 16, 16, generator=random)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def test_it_is_the_model_class_with_the_models_attributes(model, routed):
    assert isinstance(routed, LlavaForConditionalGeneration)
    assert isinstance(routed, RoutedModel)
    assert routed.config is not model.config
    assert routed.config.to_dict() == model.config.to_dict()
    assert routed.device == model.device
    assert routed.dtype == model.dtype
    assert routed.generation_config is not model.generation_config
    assert routed.generation_config.to_dict() == model.generation_config.to_dict()
    assert type(routed).__name__ == "RoutedLlavaForConditionalGeneration"


def test_parameters_are_shared_and_named_as_before(model, routed):
    ours, theirs = dict(routed.named_parameters()), dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours)


def test_the_original_model_is_not_changed(inputs):
    model = tiny_llava()
    attributes = copy.copy(model.model.language_model.__dict__)
    with torch.no_grad():
        before = model(**inputs).logits
        routed = reroute_fx.compile(model, tier=0.4, backend="eager")
        routed(**inputs)
        after = model(**inputs)
    assert torch.equal(before, after.logits)
    assert type(model) is LlavaForConditionalGeneration
    assert type(model.model.language_model).__name__ == "LlamaModel"
    assert model.model.language_model.__dict__.keys() == attributes.keys()
    assert not hasattr(after, "routing")


def test_output_has_the_models_class_and_full_logits(model, routed, inputs):
    with torch.no_grad():
        ours, theirs = routed(**inputs), model(**inputs)
    assert type(ours) is type(theirs)
    assert ours.logits.shape == theirs.logits.shape
    assert ours.image_hidden_states.shape == theirs.image_hidden_states.shape


def test_logits_to_keep_and_tuples(routed, inputs):
    with torch.no_grad():
        full = routed(**inputs)
        last = routed(**inputs, logits_to_keep=1)
        as_tuple = routed(**inputs, return_dict=False)
    torch.testing.assert_close(last.logits, full.logits[:, -1:], atol=1e-6, rtol=0)
    assert last.logits.shape[1] == 1
    assert torch.equal(as_tuple[0], full.logits)


def test_labels_give_a_loss_over_the_text(routed, inputs):
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 50, -100)
    with torch.no_grad():
        assert torch.isfinite(routed(**inputs, labels=labels).loss)


def test_without_cache(routed, inputs):
    with torch.no_grad():
        output = routed(**inputs, use_cache=False)
        cached = routed(**inputs)
    assert output.past_key_values is None
    assert torch.equal(output.logits, cached.logits)
    uncached = routed.generate(**inputs, max_new_tokens=3, do_sample=False, use_cache=False)
    assert uncached.shape[1] == inputs["input_ids"].shape[1] + 3


def test_positional_input_ids(routed, inputs):
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    with torch.no_grad():
        assert torch.equal(routed(inputs["input_ids"], **rest).logits, routed(**inputs).logits)


def test_beams_and_seeded_samples(routed, inputs):
    beams = routed.generate(**inputs, max_new_tokens=4, num_beams=3, do_sample=False)
    assert beams.shape[0] == 1
    samples = []
    for _ in range(2):
        torch.manual_seed(3)
        samples.append(routed.generate(**inputs, max_new_tokens=4, do_sample=True, num_return_sequences=2))
    assert torch.equal(*samples)


def test_streamer_sees_the_returned_tokens(routed, inputs):
    collector = Collector()
    ids = routed.generate(**inputs, max_new_tokens=4, do_sample=False, streamer=collector)
    assert collector.seen == [*ids[0].tolist(), "end"]


def test_two_images_in_one_prompt_share_one_pool(routed):
    image = [50] * 16
    ids = torch.tensor([[1, *image, 7, *image, 9, 11]])
    with torch.no_grad():
        routing = routed(input_ids=ids, pixel_values=torch.randn(2, 3, 16, 16)).routing
    first = routed.routing_config.decision_layers[0]
    assert routing.scores[first][0].shape == (32,)
    assert routing.kv_lengths[0][0] == ids.shape[1]


@pytest.mark.usefixtures("fresh_regions")
def test_compiled_for_other_sizes_and_batches(model, inputs):
    eager = reroute_fx.compile(model, tier=0.4, backend="eager")
    compiled = reroute_fx.compile(model, tier=0.4)
    image = [50] * 16
    longer = {
        "input_ids": torch.tensor([[1, *image, 7, 8, *image, 9, 11, 12]]),
        "pixel_values": torch.randn(2, 3, 16, 16),
    }
    pair = {name: torch.cat([value, value]) for name, value in inputs.items()}
    with torch.no_grad():
        for given in (inputs, longer, pair):
            torch.testing.assert_close(compiled(**given).logits, eager(**given).logits, atol=1e-5, rtol=0)
    decoder = compiled.model.language_model
    assert decoder.prefill.distinct_regions == 2  # a layer, a decision
    arguments = {"max_new_tokens": 4, "do_sample": False}
    compilations = []
    for given in (inputs, longer):
        assert torch.equal(compiled.generate(**given, **arguments), eager.generate(**given, **arguments))
        compilations.append(compiled.report.compilations)
    assert compilations[0] == compilations[1]


@pytest.mark.full("12 s; the gate has half precision in test_generation.py")
def test_bfloat16(inputs):
    model = tiny_llava().to(torch.bfloat16)
    routed = reroute_fx.compile(model, tier=0.4, backend="eager")
    given = {**inputs, "pixel_values": inputs["pixel_values"].to(torch.bfloat16)}
    with torch.no_grad():
        output = routed(**given)
        assert output.logits.dtype is torch.bfloat16
        everything = reroute_fx.compile(model, config=RoutingConfig((2, 5), (1.0, 1.0)), backend="eager")(
            **given
        )
        unrouted = model(**given)
    assert torch.isfinite(output.logits).all()
    error = (everything.logits - unrouted.logits).abs().max().float()
    # A handful of roundings of bfloat16 (8 bits of mantissa) at the size of the logits.
    assert error <= 8 * 2**-8 * unrouted.logits.abs().max().float()


def test_refuses_attention_maps(routed, inputs):
    with pytest.raises(InputError, match="output_attentions"):
        routed(**inputs, output_attentions=True)


def test_refuses_training(inputs):
    model = tiny_llava()
    with pytest.raises(UnsupportedModelError, match=r"training mode.*model\.eval\(\)"):
        reroute_fx.compile(model.train(), tier=0.4)
    routed = reroute_fx.compile(model.eval(), tier=0.4, backend="eager")
    with pytest.raises(InputError, match=r"train\(\) was called on a routed model.*compile it again"):
        routed.train()
    assert not routed.training
    assert routed.eval() is routed


NOISE = 1e-6
"""Allowed difference of logits near 0.3, whose float32 spacing is 3e-8: a few roundings in another order."""


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_routed_as_alone(routed, inputs, side):
    """Two prompts with an image and one without, of three lengths."""
    image = [50] * 16
    rows = [[1, 7, *image, 9, 11, 13], [3, 5, 8], [1, *image, 30, 31]]
    width = max(map(len, rows))
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    places = []
    for i, row in enumerate(rows):
        first = width - len(row) if side == "left" else 0
        places.append(slice(first, first + len(row)))
        ids[i, places[i]], mask[i, places[i]] = torch.tensor(row), 1
    pictures = torch.cat([inputs["pixel_values"], inputs["pixel_values"].flip(-1)])
    with torch.no_grad():
        together = routed(input_ids=ids, attention_mask=mask, pixel_values=pictures)
        for i, picture in enumerate((pictures[:1], None, pictures[1:])):
            alone = routed(input_ids=torch.tensor([rows[i]]), pixel_values=picture)
            torch.testing.assert_close(together.logits[i, places[i]], alone.logits[0], atol=NOISE, rtol=0)
            if picture is not None:
                for layer, (kept,) in alone.routing.selected.items():
                    assert torch.equal(together.routing.selected[layer][i], kept)


def test_several_tokens_on_a_cache_are_those_one_by_one(routed, inputs):
    tokens = [3, 4, 5]
    with torch.no_grad():
        cache = routed(**inputs).past_key_values
        together = routed(input_ids=torch.tensor([tokens]), past_key_values=cache).logits
        cache = routed(**inputs).past_key_values
        one_by_one = [
            routed(input_ids=torch.tensor([[token]]), past_key_values=cache).logits for token in tokens
        ]
    torch.testing.assert_close(together, torch.cat(one_by_one, dim=1), atol=NOISE, rtol=0)


def test_refuses_placeholders_without_pictures_and_the_reverse(routed, inputs):
    with pytest.raises(InputError, match=r"\[16\] image tokens in its rows but no pixel_values"):
        routed(input_ids=inputs["input_ids"])
    with pytest.raises(InputError, match="holds no image token"):
        routed(input_ids=torch.tensor([[1, 5, 6]]), pixel_values=inputs["pixel_values"])


def test_refuses_too_few_placeholders(routed, inputs):
    with pytest.raises(InputError, match=r"1 images or videos are left over.*processor"):
        routed(
            input_ids=inputs["input_ids"][:, 1:],
            pixel_values=inputs["pixel_values"].repeat(2, 1, 1, 1),
        )


def test_refuses_embeddings_empty_batches_and_visual_ends(routed, inputs):
    embeds = routed.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(InputError, match="inputs_embeds"):
        routed(inputs_embeds=embeds, pixel_values=inputs["pixel_values"])
    with pytest.raises(InputError, match=r"shape \[0, 4\]"):
        routed(input_ids=torch.zeros(0, 4, dtype=torch.long))
    with pytest.raises(InputError, match=r"ends with a visual token in rows \[0\]"):
        routed(input_ids=inputs["input_ids"][:, :18], pixel_values=inputs["pixel_values"])


def test_refuses_a_static_cache(model, routed, inputs):
    padded = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    text = {"input_ids": torch.tensor([[1, 7, 9]])}
    for given in (inputs, padded, text):
        with pytest.raises(InputError, match="cache_implementation is 'static'"):
            routed.generate(**given, max_new_tokens=2, cache_implementation="static")
        static = StaticCache(config=model.config.text_config, max_cache_len=64)
        with pytest.raises(InputError, match="past_key_values is a StaticCache"):
            routed.generate(**given, max_new_tokens=2, past_key_values=static)
    with pytest.raises(InputError, match="StaticCache"):
        routed(**inputs, past_key_values=StaticCache(config=model.config.text_config, max_cache_len=64))


def test_refuses_continuous_batching(routed):
    for ask in (routed.generate_batch, routed.init_continuous_batching):
        with pytest.raises(
            InputError, match="generate_batch was called on a routed model; expected generate"
        ):
            ask([[1, 7, 9]])


def test_refuses_new_images_and_other_routings_on_a_routed_cache(model, routed, inputs):
    with torch.no_grad():
        cache = routed(**inputs).past_key_values
        with pytest.raises(InputError, match="pixel_values was given together with a cache"):
            routed(**inputs, past_key_values=cache)
        other = reroute_fx.compile(model, tier=0.5, backend="eager")
        with pytest.raises(InputError, match="past_key_values was made with"):
            other(input_ids=torch.tensor([[3]]), past_key_values=cache)
        expected = routed.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert torch.equal(routed.generate(**inputs, max_new_tokens=3, do_sample=False), expected)


def test_a_good_call_after_an_error_is_right(routed, inputs):
    with torch.no_grad():
        expected = routed(**inputs).logits
        with pytest.raises(InputError):
            routed(input_ids=inputs["input_ids"])
        assert torch.equal(routed(**inputs).logits, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tier": 100}, "tier is 100"),
        ({"method": "magic"}, "method is 'magic'"),
        ({"action": "drop"}, "action is 'drop'"),
        ({"schedule": "loose"}, "schedule is 'loose'"),
        ({"backend": "tpu"}, "backend is 'tpu'"),
        ({"config": {"decision_layers": (2,)}}, "config is a dict"),
        ({"config": RoutingConfig((2, 8), (0.5, 0.5))}, r"decision_layers has \[8\].*8 layers"),
        *(
            ({"config": RoutingConfig((2,), (0.5,)), name: value}, f"config is given together with {name}=")
            for name, value in {
                "tier": 128,
                "method": "pdrop",
                "action": "compact_route",
                "schedule": "exact",
                "pool": "row",
            }.items()
        ),
    ],
)
def test_bad_arguments_are_refused_before_tracing(model, arguments, message, monkeypatch):
    monkeypatch.setattr("reroute_fx.api.capture_decoder", lambda _: pytest.fail("traced"))
    with pytest.raises(ConfigError, match=message):
        reroute_fx.compile(model, **arguments)
    if "backend" not in arguments:
        with pytest.raises(ConfigError, match=message):
            reroute_fx.inspect(model, **arguments)


def test_refuses_what_is_no_vision_language_model():
    with pytest.raises(UnsupportedModelError, match=r"is a Linear; expected a Hugging Face"):
        reroute_fx.compile(torch.nn.Linear(2, 2))
    text = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=9
    )
    with pytest.raises(UnsupportedModelError, match="names no image or video token"):
        reroute_fx.compile(LlamaForCausalLM(text).eval())


def test_refuses_meta_and_routed_models(model, routed):
    with pytest.raises(ConfigError, match="routed already"):
        reroute_fx.compile(routed, tier=0.4)
    with torch.device("meta"):
        empty = LlavaForConditionalGeneration(model.config).eval()
    with pytest.raises(UnsupportedModelError, match="meta device"):
        reroute_fx.compile(empty, tier=0.4)


@pytest.mark.full("5 s; passes/ refuse such layers in many forms")
def test_a_decoder_with_one_odd_layer_is_refused_with_the_nearest_miss(monkeypatch):
    model = tiny_llava()
    odd = model.model.language_model.layers[3].self_attn

    def mean_attention(hidden_states, **_):
        return hidden_states.cumsum(dim=1), None

    monkeypatch.setattr(odd, "forward", mean_attention)
    with pytest.raises(MatchError, match="7 decoder layers were found; expected 8 decoder layers"):
        reroute_fx.compile(model, tier=0.4, backend="eager")


def test_report(model, routed):
    report = routed.report
    assert report.model == "LlavaForConditionalGeneration"
    assert report.num_layers == 8
    assert {result.name: result.matched for result in report.passes}["FindLayers"] == 8
    assert {"capture", "passes"} <= report.seconds.keys()
    assert reroute_fx.inspect(model, tier=0.4).to_dict()["routed"] == report.to_dict()["routed"]
