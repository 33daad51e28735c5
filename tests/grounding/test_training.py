"""Training: packed questions are the questions, growing changes nothing, and a run goes on where it was stopped."""

import itertools

import pytest
import torch
from lessons import LessonMaker, make_lessons
from packing import IGNORED, PACKED
from rich.progress import Progress
from small_llava import IMAGE, build_model, build_processor, grow
from tower import TowerHeads, tower_labels
from train import SHALLOW, Recipe, Run, decoder_logits, decoder_phase, tower_phase

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
    box = " " + write_box((0.5, 0.25, 1.0, 0.0))
    pieces = [tokenizer.decode(token) for token in tokenizer(box, add_special_tokens=False)["input_ids"]]
    assert pieces == [" [0.50", ", 0.25", ", 1.00", ", 0.00", "]"]


def test_a_picture_is_144_tokens(processor):
    inputs = processor(images=scene("train", 0).picture, text=f"USER: {IMAGE}\nIs there a star? ASSISTANT:")
    assert inputs["input_ids"][0].count(processor.tokenizer.convert_tokens_to_ids(IMAGE)) == 144
    assert inputs["pixel_values"][0].shape == (3, SIDE, SIDE)


def lessons_about(model, processor, first, count, crowd=(5, 9)):
    return make_lessons(model, LessonMaker(processor), first, count, crowd, Progress(disable=True))


def test_lessons_are_scenes_as_the_tower_sees_them(model, processor):
    lessons = lessons_about(model, processor, 40, 35, crowd=(2, 2))
    assert [len(scene("train", 40 + i, (2, 2)).things) for i in range(35)] == [2] * 35
    pixels = processor.image_processor([scene("train", 74, (2, 2)).picture], return_tensors="pt")
    with torch.no_grad():
        alone = model.model.get_image_features(pixels["pixel_values"]).pooler_output[0]
        rest = model.model.multi_modal_projector(lessons.features.float())
    apart = (rest - alone).norm(dim=(1, 2)) / alone.norm()
    assert apart[34] < 0.02  # bfloat16 rounds by 2**-9 in each of some 20 products
    assert apart[:34].min() > 5 * apart[34]
    chosen = list(lessons.batches(8, 2, 9, seed=0))
    assert len(chosen) == 7
    assert torch.equal(torch.stack(chosen), torch.stack(list(lessons.batches(8, 0, 9, seed=0))[2:]))
    epoch = torch.cat(list(lessons.batches(8, 0, 4, seed=0)))
    assert len(epoch.unique()) == 32


def test_packed_questions_are_the_questions_asked_alone(model, processor):
    """Up to rounding the model says the same, and what it is trained to say is the answer."""
    lessons = lessons_about(model, processor, 4, 1)
    batch = lessons.pack(torch.tensor([0]))
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
            alone = answer_logits(model, batch.features, ids)[0, prefix:][learned]
        torch.testing.assert_close(packed[done : done + len(alone)], alone, rtol=1e-4, atol=1e-4)
        done += len(alone)
        words = processor.tokenizer.decode(ids[0, prefix:], skip_special_tokens=True)
        answer = processor.tokenizer.decode(batch.labels[0, turn][learned], skip_special_tokens=True)
        assert words.endswith(f"ASSISTANT:{answer}")
        assert batch.labels[0, turn][learned][-1] == processor.tokenizer.eos_token_id
    assert done == len(packed)


def answer_logits(model, features, ids):
    """The model on one question, with what its tower said before."""
    embeds = model.get_input_embeddings()(ids)
    is_image = (ids == model.config.image_token_id)[..., None]
    return model(
        inputs_embeds=embeds.masked_scatter(is_image, model.model.multi_modal_projector(features))
    ).logits


def test_growing_changes_nothing_but_the_depth(model, processor):
    batch = lessons_about(model, processor, 1, 1).pack(torch.tensor([0]))
    text = model.model.language_model
    text.config._attn_implementation = PACKED
    depth = text.config.num_hidden_layers
    with torch.no_grad():
        for layer in text.layers:
            layer.self_attn.o_proj.weight.normal_(std=0.05)
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


def test_a_run_that_was_stopped_goes_on(processor, tmp_path, monkeypatch):
    """To the same weights as one that was not: what is learnt, by which rate and from what, is taken up."""
    monkeypatch.setattr("train._SAVE_EVERY", 2)

    def run(folder, stop_after=None):
        folder.mkdir(exist_ok=True)
        model, heads = build_model(processor, seed=0), TowerHeads()
        text = model.model.language_model
        text.config.num_hidden_layers, text.config._attn_implementation = 2, PACKED
        torch.manual_seed(0)
        here = Run(folder, {"model": model, "heads": heads}, Progress(disable=True))
        phases = [
            tower_phase(model, heads, Recipe(2, 2, 1e-3), LessonMaker(processor)),
            decoder_phase("few", model, processor.tokenizer, Recipe(5, 2, 1e-3), lessons, 0),
        ]
        if stop_after is not None:
            whole = phases[1].batches
            phases[1].batches = lambda start: itertools.chain(
                itertools.islice(whole(start), stop_after), stopped()
            )
        for phase in phases:
            here.train(phase)
        return model.state_dict()

    def stopped():
        raise KeyboardInterrupt
        yield

    lessons = lessons_about(build_model(processor, seed=0), processor, 0, 4)
    straight = run(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", stop_after=3)
    resumed = run(tmp_path / "stopped")
    untrained = build_model(processor, seed=0).state_dict()
    assert sum(not torch.equal(value, untrained[name]) for name, value in resumed.items()) > 50
    for name, value in straight.items():
        assert torch.equal(resumed[name], value), name
