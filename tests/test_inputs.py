"""Prompts in other forms than a processor returns: right, or refused by name."""

import pytest
import torch
from conversations import (
    BATCHES,
    EVERYTHING,
    IMAGE,
    MIXED,
    NOISE,
    SINGLE,
    TEXT,
    batch,
    new_tokens,
    routed_model,
    unrouted_model,
)
from transformers import Trainer, TrainingArguments

from reroute_fx import InputError

pytestmark = pytest.mark.usefixtures("no_gradients", "one_thread")


@pytest.fixture(autouse=True)
def _no_offset_of_an_earlier_prompt():
    """Qwen2.5-VL keeps that of its last prompt on the module and adds it to text that follows, in whichever test."""
    unrouted_model("qwen").model.rope_deltas = None


def packed_positions(family, length, first):
    """Of two sequences in a row, as the text decoder takes them for packed ones."""
    text = torch.cat([torch.arange(first), torch.arange(length - first)])[None]
    return text if family == "llava" else text.expand(4, 1, length)


def test_sequences_packed_into_a_row_are_refused(family):
    inputs = batch(family, *SINGLE)
    length = inputs["input_ids"].shape[1]
    inputs["position_ids"] = packed_positions(family, length, length - 2)
    del inputs["attention_mask"]
    with pytest.raises(InputError, match=r"position_ids restart or jump in rows \[0\].*packed"):
        routed_model(family)(**inputs, use_cache=False)


@pytest.mark.parametrize("use_cache", [True, False])
def test_positions_that_pack_nothing_are_taken(family, use_cache):
    """With a cache, with a mask, or in time, height and width alone no position starts a sequence of its own."""
    inputs = batch(family, *SINGLE)
    length = inputs["input_ids"].shape[1]
    positions = packed_positions(family, length, length - 2)
    inputs["position_ids"] = positions if use_cache or family == "llava" else positions[1:]
    if use_cache or family == "qwen":
        del inputs["attention_mask"]
    routed = routed_model(family, EVERYTHING)(**inputs, use_cache=use_cache)
    unrouted = unrouted_model(family)(**inputs, use_cache=use_cache)
    torch.testing.assert_close(routed.logits, unrouted.logits, atol=NOISE, rtol=0)


def test_packed_text_runs_as_it_does_unrouted(family):
    given = {"input_ids": torch.tensor([[1, 5, 17, 23, 29]]), "position_ids": packed_positions(family, 5, 3)}
    routed = routed_model(family)(**given, use_cache=False)
    assert torch.equal(routed.logits, unrouted_model(family)(**given, use_cache=False).logits)


def test_generation_goes_on_with_the_grids_of_the_prompt(family):
    """What a processor returned, less the pixels, may come again with the cache."""
    routed, inputs = routed_model(family), batch(family, *MIXED)
    wanted = new_tokens(routed, inputs, max_new_tokens=6)
    first = routed.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    again = {name: value for name, value in inputs.items() if name != "pixel_values"}
    again["input_ids"], again["attention_mask"] = first.sequences, mask_behind(inputs, 3)
    more = routed.generate(**again, past_key_values=first.past_key_values, max_new_tokens=3)
    assert torch.equal(more[:, inputs["input_ids"].shape[1] :], wanted)


def test_a_forward_on_a_cache_takes_the_grids_of_the_prompt(family):
    routed, inputs = routed_model(family), batch(family, *SINGLE)
    step = {"input_ids": torch.tensor([[5]]), "attention_mask": mask_behind(inputs, 1)}
    wanted = routed(**step, past_key_values=routed(**inputs).past_key_values)
    again = {name: value for name, value in inputs.items() if name not in ("pixel_values", *step)}
    found = routed(**again, **step, past_key_values=routed(**inputs).past_key_values)
    assert torch.equal(found.logits, wanted.logits)


def mask_behind(inputs, count):
    """The mask of a prompt and of as many tokens behind it."""
    mask = inputs["attention_mask"]
    return torch.cat([mask, torch.ones_like(mask[:, :1]).expand(-1, count)], dim=1)


def embedded(family, inputs):
    """`inputs` with the embeddings that the model gives its decoder, in place of the pictures."""
    model = unrouted_model(family)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    features = image_features(model, inputs).pooler_output
    is_visual = inputs["input_ids"] == IMAGE
    embeds = embeds.masked_scatter(is_visual[..., None], torch.cat(list(features)))
    return {**without(inputs, "pixel_values"), "inputs_embeds": embeds}, is_visual


def image_features(model, inputs):
    grids = {name: value for name, value in inputs.items() if name == "image_grid_thw"}
    return model.get_image_features(inputs["pixel_values"], **grids)


def without(inputs, *names):
    return {name: value for name, value in inputs.items() if name not in names}


@pytest.mark.parametrize("rows", BATCHES)
def test_embeddings_beside_ids_are_routed_as_the_pictures(family, rows):
    routed, inputs = routed_model(family), batch(family, *BATCHES[rows])
    given, _ = embedded(family, inputs)
    found, wanted = routed(**given), routed(**inputs)
    torch.testing.assert_close(found.logits, wanted.logits, atol=NOISE, rtol=0)
    for layer, kept in wanted.routing.all_kept.items():
        assert torch.equal(found.routing.all_kept[layer], kept)
    assert torch.equal(
        new_tokens(routed, given, max_new_tokens=4), new_tokens(routed, inputs, max_new_tokens=4)
    )


def test_embeddings_of_text_and_placeholders_take_their_pictures(family):
    """The prompt's embeddings as they are before pictures come in."""
    routed, inputs = routed_model(family), batch(family, *MIXED)
    embeds = routed.get_input_embeddings()(inputs["input_ids"])
    found = routed(**inputs, inputs_embeds=embeds)
    torch.testing.assert_close(found.logits, routed(**inputs).logits, atol=NOISE, rtol=0)
    beams = {"num_beams": 2, "max_new_tokens": 4}
    assert torch.equal(
        new_tokens(routed, inputs, inputs_embeds=embeds, **beams), new_tokens(routed, inputs, **beams)
    )


@pytest.mark.parametrize("rows", BATCHES)
def test_embeddings_with_a_mask_of_the_visual_tokens(rows):
    routed, inputs = routed_model("llava"), batch("llava", *BATCHES[rows])
    given, is_visual = embedded("llava", inputs)
    given = {**without(given, "input_ids"), "visual_mask": is_visual}
    torch.testing.assert_close(routed(**given).logits, routed(**inputs).logits, atol=NOISE, rtol=0)
    assert torch.equal(
        routed.generate(**given, max_new_tokens=4), new_tokens(routed, inputs, max_new_tokens=4)
    )


def test_a_mask_of_the_visual_tokens_needs_positions_in_three_dimensions():
    routed, inputs = routed_model("qwen"), batch("qwen", *MIXED)
    given, is_visual = embedded("qwen", inputs)
    given = {"inputs_embeds": given["inputs_embeds"], "attention_mask": inputs["attention_mask"]}
    for call in (routed, routed.generate):
        with pytest.raises(InputError, match=r"without position_ids.*\[3, batch, length\]"):
            call(**given, visual_mask=is_visual)
    positions, _ = unrouted_model("qwen").model.get_rope_index(**without(inputs, "pixel_values"))
    found = routed(**given, visual_mask=is_visual, position_ids=positions)
    torch.testing.assert_close(found.logits, routed(**inputs).logits, atol=NOISE, rtol=0)


def test_embeddings_without_pictures_run_as_text(family):
    model, ids = unrouted_model(family), torch.tensor([[1, 5, 17, 23, 29]])
    embeds, routed = model.get_input_embeddings()(ids), routed_model(family)
    assert torch.equal(routed(inputs_embeds=embeds).logits, model(inputs_embeds=embeds).logits)
    both = routed(input_ids=ids, inputs_embeds=embeds)
    assert torch.equal(both.logits, model(input_ids=ids).logits)
    found = routed.generate(inputs_embeds=embeds, max_new_tokens=3)
    assert torch.equal(found, model.generate(inputs_embeds=embeds, max_new_tokens=3))


def test_embeddings_are_refused_where_nothing_says_what_is_visual(family):
    routed, inputs = routed_model(family), batch(family, *SINGLE)
    embeds = routed.get_input_embeddings()(inputs["input_ids"])
    given = {**without(inputs, "input_ids"), "inputs_embeds": embeds}
    for call in (routed, routed.generate):
        with pytest.raises(InputError, match="visual_mask"):
            call(**given)
    with pytest.raises(InputError, match=r"visual_mask has dtype torch\.int64"):
        routed(**given, visual_mask=(inputs["input_ids"] == IMAGE).long())
    with pytest.raises(InputError, match="visual_mask is a list"):
        routed(**given, visual_mask=[True])
    with pytest.raises(InputError, match="visual_mask marks other tokens"):
        routed(**inputs, visual_mask=inputs["input_ids"] != IMAGE)
    with pytest.raises(InputError, match="an embedding for each token"):
        routed(**without(given, "inputs_embeds"), input_ids=inputs["input_ids"], inputs_embeds=embeds[:, 1:])


def test_positions_of_embeddings_need_the_grids():
    routed, inputs = routed_model("qwen"), batch("qwen", *SINGLE)
    given, _ = embedded("qwen", inputs)
    with pytest.raises(InputError, match=r"positions in time, height and width.*mm_token_type_ids"):
        routed(**without(given, "mm_token_type_ids"))


def test_features_in_place_of_pixels(family):
    routed, inputs = routed_model(family), batch(family, *MIXED)
    given = {
        **without(inputs, "pixel_values"),
        "mm_encoder_outputs": {"image": image_features(unrouted_model(family), inputs)},
    }
    torch.testing.assert_close(routed(**given).logits, routed(**inputs).logits, atol=NOISE, rtol=0)
    wanted = new_tokens(routed, inputs, max_new_tokens=4)
    assert torch.equal(new_tokens(routed, given, max_new_tokens=4), wanted)
    with pytest.raises(InputError, match="no image token"):
        routed(input_ids=torch.tensor([[1, 5, 6]]), mm_encoder_outputs=given["mm_encoder_outputs"])


def loss_inputs(inputs):
    """No label is behind padding: what padding predicts is nobody's."""
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return {
        "plain": {"labels": labels},
        "shifted": {"labels": labels, "shift_labels": shifted},
        "counted": {"labels": labels, "num_items_in_batch": 7},
    }


@pytest.mark.parametrize("given", ["plain", "shifted", "counted"])
@pytest.mark.parametrize("rows", [MIXED, TEXT], ids=["pictures", "text"])
def test_losses_are_those_of_the_unrouted_model(family, rows, given):
    inputs = batch(family, *rows, pad="right")
    losses = loss_inputs(inputs)[given]
    found = routed_model(family, EVERYTHING)(**inputs, **losses).loss
    torch.testing.assert_close(found, unrouted_model(family)(**inputs, **losses).loss, atol=NOISE, rtol=0)


def test_losses_with_gradients_are_refused(family):
    routed, inputs = routed_model(family), batch(family, *SINGLE)
    for name in ("labels", "shift_labels"):
        with torch.enable_grad(), pytest.raises(InputError, match=rf"{name}.*inference.*no_grad"):
            routed(**inputs, **{name: inputs["input_ids"]})


def test_a_trainer_evaluates(family, tmp_path):
    inputs = batch(family, *SINGLE)
    example = {name: value if name in PICTURE_INPUTS else value[0] for name, value in inputs.items()}
    example["labels"] = example["input_ids"]
    arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True, per_device_eval_batch_size=2)
    losses = [
        Trainer(model, arguments, eval_dataset=[example] * 2, data_collator=collate).evaluate()["eval_loss"]
        for model in (routed_model(family, EVERYTHING), unrouted_model(family))
    ]
    assert losses[0] == pytest.approx(losses[1], abs=NOISE)


PICTURE_INPUTS = ("pixel_values", "image_grid_thw")


def collate(examples):
    return {
        name: (torch.cat if name in PICTURE_INPUTS else torch.stack)([example[name] for example in examples])
        for name in examples[0]
    }
