"""Training: packed questions are the questions, growing changes nothing, and a run goes on where it was stopped."""

import pytest
import torch
from packing import IGNORED, PACKED
from small_llava import IMAGE, build_model, build_processor, grow
from train import SHALLOW, Maker, decoder_logits, tower_labels

from reroute_fx.grounding.questions import questions, write_box
from reroute_fx.grounding.scenes import COLOURS, SHAPES, SIDE, scene


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def model(processor):
    return build_model(processor, seed=0).eval()


def test_every_question_and_answer_survives_the_tokenizer(processor):
    tokenizer = processor.tokenizer
    for number in range(60):
        for question in [q for kind in questions(scene("train", number), 8, 6) for q in kind]:
            text = f"USER: \n{question.text} ASSISTANT: {question.answer}"
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id in tokenizer(" unicorn")["input_ids"]
    assert len(tokenizer(write_box((0.5, 0.25, 1.0, 0.0)), add_special_tokens=False)["input_ids"]) == 9


def test_a_picture_is_144_tokens(processor):
    inputs = processor(images=scene("train", 0).picture, text=f"USER: {IMAGE}\nIs there a star? ASSISTANT:")
    assert inputs["input_ids"][0].count(processor.tokenizer.convert_tokens_to_ids(IMAGE)) == 144
    assert inputs["pixel_values"][0].shape == (3, SIDE, SIDE)


def test_packed_questions_are_the_questions_asked_alone(model, processor):
    """Up to rounding the model says the same, and what it is trained to say is the answer."""
    batch = Maker(processor).decoder([scene("train", 4)])
    text = model.model.language_model
    text.config._attn_implementation = PACKED
    with torch.no_grad():
        packed = decoder_logits(model, batch)
    text.config._attn_implementation = "sdpa"
    prefix, length = batch.prefix, batch.length
    done = 0
    for start in range(prefix, batch.input_ids.shape[1], length):
        turn = slice(start, start + length)
        ids = torch.cat([batch.input_ids[:, :prefix], batch.input_ids[:, turn]], 1)
        learned = batch.labels[0, turn] != IGNORED
        with torch.no_grad():
            alone = model(input_ids=ids, pixel_values=batch.pixel_values).logits[0, prefix:][learned]
        torch.testing.assert_close(packed[done : done + len(alone)], alone, rtol=1e-4, atol=1e-4)
        done += len(alone)
        words = processor.tokenizer.decode(ids[0, prefix:], skip_special_tokens=True)
        answer = processor.tokenizer.decode(batch.labels[0, turn][learned], skip_special_tokens=True)
        assert words.endswith(f"ASSISTANT:{answer}")
        assert batch.labels[0, turn][learned][-1] == processor.tokenizer.eos_token_id
    assert done == len(packed)


def test_growing_changes_nothing_but_the_depth(model, processor):
    batch = Maker(processor).decoder([scene("train", 1)])
    text = model.model.language_model
    text.config._attn_implementation = PACKED
    depth = text.config.num_hidden_layers
    with torch.no_grad():
        text.config.num_hidden_layers = SHALLOW
        shallow = decoder_logits(model, batch)
        text.config.num_hidden_layers = depth
        assert not torch.equal(decoder_logits(model, batch), shallow)
        grow(model, SHALLOW)
        assert torch.equal(decoder_logits(model, batch), shallow)
    text.config._attn_implementation = "sdpa"


def test_labels_of_patches():
    here = scene("train", 2)
    labels = tower_labels(here)
    side = 12
    for thing in here.things:
        column, row = (
            int(value * side)
            for value in ((thing.box[0] + thing.box[2]) / 2, (thing.box[1] + thing.box[3]) / 2)
        )
        patch = row * side + column
        assert labels["shape"][patch] == SHAPES.index(thing.shape)
        assert labels["box"][patch].tolist() == pytest.approx(thing.box)
        assert (
            labels["kinds"][list(COLOURS).index(thing.colour) * len(SHAPES) + SHAPES.index(thing.shape)] == 1
        )
    assert labels["kinds"].sum() == len({(t.colour, t.shape) for t in here.things})
    covered = sum(t.side**2 for t in here.things) / SIDE**2
    assert (labels["size"] >= 0).mean() == pytest.approx(covered, abs=0.1)
