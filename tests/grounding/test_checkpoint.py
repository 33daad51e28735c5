"""The checkpoint answers as its card and the study say, and all that is said of it is what was measured."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from card import FIRST as COUNT
from contenders import contenders
from evaluate import RESULTS, record
from huggingface_hub import ModelCard
from PIL import Image
from summary import first_answers, markdown_table, score
from transformers import AutoProcessor

from reroute_fx.evals.tasks import shapes_scores
from reroute_fx.grounding.questions import KINDS, collect
from reroute_fx.grounding.scenes import SIDE
from reroute_fx.loading.models_by_name import CHECKPOINT, load_model
from reroute_fx.loading.prompts import render_chat

PAGE = Path(__file__).parents[2] / "docs" / "grounding.md"
LMMS_EVAL = json.loads((RESULTS / "lmms_eval.json").read_text())


@pytest.fixture(scope="module")
def study():
    return json.loads((RESULTS / "grounding.json").read_text())


@pytest.fixture(scope="module")
def card():
    """Value of each metric by name and part of the test set."""
    data = ModelCard.load(CHECKPOINT / "README.md").data
    assert data.license == "apache-2.0"
    return {(result.metric_name, result.dataset_split): result.metric_value for result in data.eval_results}


def percentages(scores):
    return {"ACC@0.5": 100 * scores.accuracy.mean, "yes/no accuracy": 100 * scores.right.mean}


@pytest.fixture(scope="module")
def answered():
    """Scores of some contenders on the first prompts, asked now."""
    loaded = load_model("demo", "cpu", "float32")
    prompts = {kind: collect("test", 0, COUNT, kind) for kind in KINDS}
    chosen = [c for c in contenders(loaded.model, 0, RESULTS) if c.name == "unrouted" or c.tier == 128]
    wanted = [c for c in chosen if c.name in ("unrouted", "pdrop routed", "fastv routed")]
    records = [record(c, loaded.processor, prompts[kind], 0, kind) for c in wanted for kind in KINDS]
    return {c.name: percentages(score(records, c.name, c.tier)) for c in wanted}


def test_the_chat_template_gives_the_words_of_the_training(monkeypatch):
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    asked = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "Where is the red circle?"}],
    }
    answered = {"role": "assistant", "content": [{"type": "text", "text": "[0.10, 0.20, 0.30, 0.40]"}]}
    told = {"role": "user", "content": [{"type": "text", "text": "Is there a square?"}]}
    conversations = [[asked], [asked, answered, told]]
    texts = [processor.apply_chat_template(each, add_generation_prompt=True) for each in conversations]
    picture = Image.new("RGB", (SIDE, SIDE))
    shown = [{**asked, "content": [{"type": "image", "image": picture}, asked["content"][1]]}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    ids = processor.apply_chat_template(shown, **options)["input_ids"]
    assert torch.equal(ids, processor(images=picture, text=texts[0], return_tensors="pt")["input_ids"])
    assert texts[0] == "USER: <image>\nWhere is the red circle? ASSISTANT:"
    monkeypatch.setattr(processor, "chat_template", None)
    assert texts == [render_chat(processor, each) for each in conversations]


@pytest.mark.full("47 s for answers; the demo of the wheel check asks this checkpoint")
def test_unrouted_answers_score_as_the_card_says(answered, card):
    for name, value in answered["unrouted"].items():
        assert value == pytest.approx(card[name, f"first {COUNT}"], abs=2)


@pytest.mark.parametrize("contender", ["pdrop routed", "fastv routed"])
@pytest.mark.full("47 s for answers; the demo of the wheel check asks this checkpoint")
def test_routed_answers_score_as_the_study_says(answered, study, contender):
    said = score(first_answers(study["records"], COUNT), contender, 128)
    for name, value in percentages(said).items():
        assert answered[contender][name] == pytest.approx(value, abs=2)


def test_the_card_says_what_the_study_found(card, study):
    whole = percentages(score(study["records"], "unrouted", None))
    first = percentages(score(first_answers(study["records"], COUNT), "unrouted", None))
    assert len(card) == 4
    for name in whole:
        assert card[name, "test"] == round(whole[name], 1)
        assert card[name, f"first {COUNT}"] == round(first[name], 1)


def test_the_study_is_of_this_checkpoint_and_of_every_contender(study):
    weights = CHECKPOINT / "model.safetensors"
    assert weights.stat().st_size < 25 * 2**20
    assert study["weights"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    asked = {(r["contender"], r["tier"], r["seed"], r["kind"]) for r in study["records"]}
    assert len(asked) == len(study["records"]) == 39 * 3 * 2
    assert all(len(r["answers"]) == 300 for r in study["records"])


def test_the_page_has_the_study_s_table(study):
    assert markdown_table(study["records"]) in PAGE.read_text()


@pytest.mark.parametrize("model", ["unrouted", "deleted", "routed"])
def test_lmms_eval_scores_as_we_do(model, study):
    """And the model that it runs answers as in the study."""
    recorded = LMMS_EVAL["models"][model]
    assert LMMS_EVAL["listed"] is True
    said, told = recorded["answers"].values()
    assert recorded["lmms_eval"] == pytest.approx(shapes_scores(said, told))
    name, tier = ("unrouted", None) if model == "unrouted" else (f"pdrop {model}", 128)
    first = [
        r for r in first_answers(study["records"], len(said)) if (r["contender"], r["tier"]) == (name, tier)
    ]
    answers = [a["answer"] for r in first for a in r["answers"]]
    same = [a.strip() == b for a, b in zip([*said, *told], answers, strict=True)]
    assert sum(same) > 0.97 * len(same) > 380
