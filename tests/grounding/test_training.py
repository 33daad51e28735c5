"""Training: packed questions are the questions, growing changes nothing, and a run goes on where it was stopped."""

import itertools

import pytest
import score
import torch
from lessons import LessonMaker, Told, make_lessons
from packing import IGNORED, PACKED, lay_out, pack
from rich.progress import Progress
from small_llava import IMAGE, WIDTH, build_model, build_processor, grow
from torch import nn
from tower import FIELDS, NOTHING, TowerHeads, tower_labels
from train import (
    SHALLOW,
    Described,
    Phase,
    Recipe,
    Run,
    Weights,
    decoder,
    decoder_logits,
    decoder_phase,
    keep,
    seen,
    take_tower,
    told,
    told_of_few,
    tower,
    tower_phase,
)

from reroute_fx.errors import ConfigError
from reroute_fx.grounding.questions import near_misses, questions, write_box
from reroute_fx.grounding.scenes import COLOURS, CROWD, SHAPES, SIDE, scene


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def model(processor):
    return build_model(processor, seed=0).eval()


def test_every_question_and_answer_survives_the_tokenizer(processor):
    tokenizer = processor.tokenizer
    for number in range(60):
        here = scene("train", number)
        boxes, truths = questions(here, 8, 6)
        for question in boxes + truths + near_misses(here, 6):
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


def test_turns_are_laid_out_in_rows():
    """Each where it first fits; what has no room is left out, and padding is a turn that no other token belongs to."""
    turns = [([1, 2], [3]), ([4], [5]), ([6, 7, 8], [9]), ([1] * 6, [2])]
    ids, labels, places = lay_out(turns, rows=2, length=6, pad=0)
    assert ids == [[1, 2, 3, 4, 5, 0], [6, 7, 8, 9, 0, 0]]
    no = IGNORED
    assert labels == [[no, 3, no, 5, no, no], [no, no, 9, no, no, no]]
    assert [row[:5] for row in places] == [[0, 0, 0, 1, 1], [0, 0, 0, 0, places[1][5]]]
    packed = pack(torch.zeros(1, 2, 4), [8, 9], *(torch.tensor([each]) for each in (ids, labels, places)))
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3, 2, 2, 3, 4, 5, 2, 3]]
    assert packed.mask[0, 0, 0].int().tolist()[3:] == [
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_packed_questions_are_the_questions_asked_alone(model, processor):
    """Up to rounding the model says the same, and what it is trained to say is the answer."""
    lessons = lessons_about(model, processor, 4, 1)
    pictures = model.model.multi_modal_projector(lessons.features[:1].float())
    batch = lessons.pack(torch.tensor([0]), pictures)
    text = model.model.language_model
    text.config._attn_implementation = PACKED
    with torch.no_grad():
        packed = decoder_logits(model, batch)
    text.config._attn_implementation = "sdpa"
    before = batch.input_ids[:, : batch.prefix]
    done = asked = 0
    for row, places in enumerate(lessons.turns[0]):
        for place in places.unique():
            if place == places[-1] and lessons.questions[0, row, -1] == processor.tokenizer.pad_token_id:
                continue
            turn = places == place
            ids = torch.cat([before, lessons.questions[0, row, turn][None].long()], 1)
            labels = lessons.answers[0, row, turn].long()
            with torch.no_grad():
                alone = answer_logits(model, batch.pictures, ids)[0, batch.prefix :][labels != IGNORED]
            torch.testing.assert_close(packed[done : done + len(alone)], alone, rtol=1e-4, atol=1e-4)
            done, asked = done + len(alone), asked + 1
            words = processor.tokenizer.decode(ids[0, batch.prefix :], skip_special_tokens=True)
            answer = processor.tokenizer.decode(labels[labels != IGNORED], skip_special_tokens=True)
            assert words.endswith(f"ASSISTANT:{answer}")
            assert labels[labels != IGNORED][-1] == processor.tokenizer.eos_token_id
    assert done == len(packed)
    assert asked > len(lessons.turns[0])


def test_tokens_of_answers_count_as_they_are_weighted(model, processor):
    lessons = lessons_about(model, processor, 4, 1)
    batch = lessons.pack(torch.tensor([0]), lessons.features[:1].float())
    text, tokenizer = model.model.language_model, processor.tokenizer
    text.config._attn_implementation = PACKED

    def loss(*weights):
        recipe = Recipe(1, 1, 1e-3)
        phase = decoder_phase("told", model, tokenizer, recipe, lambda _: [], Weights(*weights))
        with torch.no_grad():
            return phase.loss(batch)[0].item()

    said = tokenizer.convert_ids_to_tokens(batch.labels[batch.labels != IGNORED])
    kinds = [0 if token.startswith(" [") else 1 if token in (" yes", " no") else 2 for token in said]
    alone, counts = [loss(1, 0, 0), loss(0, 1, 0), loss(0, 0, 1)], [kinds.count(kind) for kind in range(3)]
    shares = [weight * count for weight, count in zip((6, 1, 0.5), counts, strict=True)]
    expected = sum(share * each for share, each in zip(shares, alone, strict=True)) / sum(shares)
    assert loss(6, 1, 0.5) == pytest.approx(expected, rel=1e-4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = decoder_logits(model, batch).float()
    text.config._attn_implementation = "sdpa"
    first = torch.tensor(kinds) == 0
    labels = batch.labels[batch.labels != IGNORED]
    assert alone[0] == pytest.approx(torch.nn.functional.cross_entropy(logits[first], labels[first]).item())
    assert len({round(each, 3) for each in alone}) == 3
    assert min(counts) > 0


def answer_logits(model, pictures, ids):
    """The model on one question, with pictures as its decoder reads them."""
    embeds = model.get_input_embeddings()(ids)
    is_image = (ids == model.config.image_token_id)[..., None]
    return model(inputs_embeds=embeds.masked_scatter(is_image, pictures)).logits


def test_words_look_up_what_they_describe(processor):
    """In two heads of a layer that has learnt nothing yet, and what is found is passed on."""
    model = build_model(processor, seed=3, layers=4)
    described, tokenizer = Described(model, processor.tokenizer), processor.tokenizer
    labels = LessonMaker(processor).labels([scene("train", number) for number in range(8)])
    patches = described(labels)
    model.model.language_model.config._attn_implementation = "eager"
    attention = model.model.language_model.layers[0].self_attn
    assert torch.allclose(
        attention.o_proj.weight @ attention.v_proj.weight, 0.5 * torch.eye(WIDTH), atol=1e-5
    )
    on = labels["size"] != NOTHING
    odds = []
    for word in ("red", "striped", "star", "circle", "large"):
        fitting = sum((labels[f] == words.index(word)) & on for f, words in FIELDS.items() if word in words)
        asked = model.get_input_embeddings()(torch.tensor(tokenizer.convert_tokens_to_ids(f" {word}")))
        streams = torch.cat([patches, asked.expand(8, 1, -1)], dim=1)
        with torch.no_grad():
            found = model.model.language_model(inputs_embeds=streams, output_attentions=True).attentions[0]
        looked = found[:, :2, -1, :-1].mean(1)  # [B, N]
        others = on & (fitting == 0)
        odds.append((looked * fitting).sum() / fitting.sum() / ((looked * others).sum() / others.sum()))
    assert min(odds) > 1.5
    assert sum(odds) / len(odds) > 3


def test_scenes_are_told_without_mistakes(model, processor):
    """As the projector is to describe them: each box by the numbers that are nearest, and nothing where nothing is."""
    described, maker = Described(model, processor.tokenizer), LessonMaker(processor)
    recipe = Recipe(3, 2, 1e-3)
    batches = list(told_of_few(described, recipe, maker, 50, CROWD)(1))
    assert len(batches) == 2
    labels, laid_out = Told(maker, 50, CROWD, recipe.batch, 1, 3)[1]
    assert torch.equal(batches[1].pictures, described(labels))
    assert torch.equal(batches[1].input_ids[:, batches[1].prefix :], laid_out[0].flatten(1).long())
    for row, number in enumerate((54, 55)):
        here = torch.from_numpy(tower_labels(scene("train", number))["box"])
        on = here.any(-1)
        assert not batches[1].pictures[row][~on].any()
        for place, side in zip(described.sides, here.T, strict=True):
            said = (batches[1].pictures[row][on] @ place @ described.waves.T).argmax(-1)
            assert torch.equal(said, (side[on] * 100).round().long())


def test_lessons_are_told_in_the_same_way(model, processor):
    """Scenes that are drawn once, in the order of their batches: as those that are new in each step."""
    described, maker = Described(model, processor.tokenizer), LessonMaker(processor)
    lessons = lessons_about(model, processor, 6, 4)
    batches = list(told(described, Recipe(2, 2, 1e-3), lessons, 3)(0))
    assert len(batches) == 2
    for batch, chosen in zip(batches, lessons.batches(2, 0, 2, 3), strict=True):
        for row, number in enumerate(chosen.tolist()):
            labels, laid_out = Told(maker, 6 + number, CROWD, 1, 0, 1)[0]
            assert torch.equal(batch.pictures[row], described(labels)[0])
            assert torch.equal(batch.input_ids[row, batch.prefix :], laid_out[0].flatten().long())


def test_all_layers_learn_from_the_first_step(processor, tmp_path):
    """Of a model that is not grown: what layers read is trained as soon as what they add is not zero any more."""
    model = build_model(processor, seed=1, layers=24)
    text = model.model.language_model
    assert len(text.layers) == 24
    text.config._attn_implementation = PACKED
    recipe = Recipe(2, 1, 1e-3)
    batches = told_of_few(Described(model, processor.tokenizer), recipe, LessonMaker(processor), 0, (1, 1))
    before = [{name: value.clone() for name, value in layer.named_parameters()} for layer in text.layers]
    Run(tmp_path, {"model": model}, Progress(disable=True)).train(
        decoder_phase("one", model, processor.tokenizer, recipe, batches, Weights(1.0, 1.0, 1.0))
    )
    for layer, old in zip(text.layers, before, strict=True):
        same = [name for name, value in layer.named_parameters() if torch.equal(value, old[name])]
        assert same == []


def test_a_tower_that_has_seen_nothing_is_refused(tmp_path, model):
    with pytest.raises(
        ConfigError, match=r"has no lessons\.pt; expected a folder of `train.py tower`, run to its end"
    ):
        take_tower(model, tmp_path)


def test_what_a_run_has_learnt_is_kept_without_its_optimizers(tmp_path):
    """A phase goes on at its step, from weights as exact as bfloat16, and one of no steps is done."""
    layer, recipe = nn.Linear(4, 4), Recipe(3, 1, 1e-2)

    def phase(name, learner, recipe):
        def loss(number):
            return learner(torch.ones(4)).square().sum() * number, lambda: ""

        return Phase(name, recipe, learner, [learner], lambda start: range(start + 1, recipe.steps + 1), loss)

    (tmp_path / "run").mkdir()
    run = Run(tmp_path / "run", {"layer": layer}, Progress(disable=True))
    run.train(phase("nothing", layer, Recipe(0, 1, 1e-2)))
    run.train(phase("half", layer, Recipe(2, 1, 1e-2)))
    keep(tmp_path / "run", tmp_path / "kept" / "small.pt")
    (tmp_path / "again").mkdir()
    (tmp_path / "kept" / "small.pt").rename(tmp_path / "again" / "state.pt")
    again = nn.Linear(4, 4)
    taken = Run(tmp_path / "again", {"layer": again}, Progress(disable=True))
    assert torch.equal(again.weight, layer.weight.bfloat16().float())
    assert {name: state["step"] for name, state in taken.phases.items()} == {"nothing": 0, "half": 2}
    went_on = phase("half", again, recipe)
    taken.train(went_on)
    assert went_on.step == 3
    assert not torch.equal(again.weight, layer.weight.bfloat16().float())


@pytest.mark.parametrize("grown", [False, True])
@pytest.mark.full("20 s; phases, growing and what is taken up are tested alone")
def test_a_decoder_is_trained_for_a_tower_and_scored(grown, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("train._FEW_STEPS", 1)
    monkeypatch.setattr("train._ALIGN_STEPS", 2)
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: None)
    tower(tmp_path / "tower", steps=1, scenes=64)
    how = {"tower": tmp_path / "tower", "layers": 8, "grown": grown, "told_steps": 1, "seen_steps": 1}
    decoder(tmp_path / "run", **how, slower_steps=1, seed=3)
    score.main(tmp_path / "run" / "model", count=2)
    trained = capsys.readouterr().out
    assert sum(int(line.split("|")[2]) for line in trained.splitlines()[-6:] if "|" in line) == 6
    weights = torch.load(tmp_path / "run" / "state.pt")["model"]
    taken = torch.load(tmp_path / "tower" / "state.pt")["tower"]
    for name, value in taken.items():
        assert torch.equal(weights[f"model.vision_tower.{name}"], value)


def test_a_run_is_scored_once_it_has_seen_pictures(tmp_path, processor, capsys):
    state = {"model": build_model(processor, 0, layers=5).state_dict(), "phases": {"told": {}}}
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(
        ConfigError, match="a run in its phase 'told'; expected one that has begun its phase 'seen'"
    ):
        score.main(tmp_path, count=1)
    torch.save({**state, "phases": {"told": {}, "seen": {}}}, tmp_path / "state.pt")
    assert len(score.model_of_run(tmp_path).model.language_model.layers) == 5
    score.main(tmp_path, count=2)
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    assert sum(int(line[2]) for line in lines) == 6
    assert any("near" in line[1] for line in lines)


def test_growing_changes_nothing_but_the_depth(model, processor):
    lessons = lessons_about(model, processor, 1, 1)
    batch = lessons.pack(torch.tensor([0]), lessons.features.float())
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


@pytest.mark.full("4 s; it guards training, no product code")
def test_a_run_that_was_stopped_goes_on(processor, tmp_path, monkeypatch):
    """To the same weights as one that was not: what is learnt, by which rate and from what, is taken up."""
    monkeypatch.setattr("train._SAVE_EVERY", 2)

    recipe = Recipe(5, 2, 1e-3)

    def run(folder, stop_after=None):
        folder.mkdir(exist_ok=True)
        model, heads = build_model(processor, seed=0), TowerHeads()
        text = model.model.language_model
        text.config.num_hidden_layers, text.config._attn_implementation = 2, PACKED
        torch.manual_seed(0)
        here = Run(folder, {"model": model, "heads": heads}, Progress(disable=True))
        phases = [
            tower_phase(model, heads, Recipe(2, 2, 1e-3), LessonMaker(processor)),
            decoder_phase(
                "few",
                model,
                processor.tokenizer,
                recipe,
                seen(model, recipe, lessons, 0),
                Weights(3.0, 2.0, 1.0),
            ),
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
