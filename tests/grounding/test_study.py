"""The study runs from a checkpoint to table and plots, and counts what it says."""

import json

import evaluate
import numpy as np
import pytest
import torch
from contenders import BATCH, Contender, RandomScores, contenders, make_inputs
from PIL import Image
from recovery import recovery, tokens_on
from small_llava import build_model, build_processor
from summary import ORDER, markdown_table, score, stage_counts

import reroute_fx
from reroute_fx.errors import ConfigError, UnsupportedModelError
from reroute_fx.grounding.questions import collect
from reroute_fx.grounding.scoring import share

COUNT = 3


STUDY = pytest.mark.full(
    "runs the grounding study, which is no product code; its counting is tested in the gate"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Untrained, half as deep, and its layers look at different things."""
    folder = tmp_path_factory.mktemp("checkpoint")
    processor = build_processor()
    model = build_model(processor, seed=0)
    text = model.model.language_model
    text.layers = text.layers[:8]
    text.config.num_hidden_layers = 8
    with torch.no_grad():
        for layer in text.layers:
            for of in ("q_proj", "k_proj", "o_proj"):
                getattr(layer.self_attn, of).weight.normal_(std=0.3)
            layer.mlp.down_proj.weight.normal_(std=0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def results(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("contenders.TIERS", {128: 2 / 9})
        evaluate.main(checkpoint, folder, seeds=1, count=COUNT)
    return folder


@pytest.fixture(scope="module")
def records(results):
    return json.loads((results / "grounding.json").read_text())["records"]


@STUDY
def test_everyone_answers_every_prompt(records):
    names = [record["contender"] for record in records[::3]]
    assert [record["kind"] for record in records[:3]] == ["refer", "yes/no", "near misses"]
    beyond_reach = {"pdrop-official routed", "feather routed"}
    assert set(names) == {"unrouted", *ORDER} - beyond_reach - {"tuned routed"}
    assert len(names) == len(set(names)) == 12
    for record in records:
        assert len(record["answers"]) == COUNT
        fields = {"answer", "kind", "hops", "iou" if record["kind"] == "refer" else "target"}
        assert all(set(answer) == fields for answer in record["answers"])


@STUDY
def test_stages_keep_what_the_tier_promises(records):
    for name in ("fastv routed", "pdrop routed"):
        stages = stage_counts(records, name, 128)
        assert len(stages) == 4
        assert all(stage["tokens"] == 144 * COUNT for stage in stages)
        config = reroute_fx.RoutingConfig.from_tier(2 / 9, name.split()[0], num_layers=8)
        assert [stage["kept"] for stage in stages] == [count * COUNT for count in config.keep_counts(144)]
        assert stages[0]["back"] == stages[0]["out"] == 0
        assert any(stage["back"] for stage in stages[1:])
    for stage in stage_counts(records, "pdrop deleted", 128):
        assert stage["back"] == 0


@STUDY
def test_table_and_plots_are_drawn(results, records):
    table = markdown_table(records)
    assert len(table.splitlines()) == 2 + 12
    assert "| 128 | pdrop routed | " in table
    for name in ("grounding_accuracy.png", "grounding_recovery.png"):
        with Image.open(results / name) as plot:
            assert len(np.unique(np.asarray(plot.convert("RGB")).reshape(-1, 3), axis=0)) > 50


def test_scores_are_counted():
    def made(name, tier, kind, answers):
        return {"contender": name, "tier": tier, "seed": 0, "kind": kind, "answers": answers, "stages": []}

    def box(iou, hops, answer="a"):
        return {"answer": answer, "kind": "refer", "hops": hops, "iou": iou}

    def word(answer, target):
        return {"answer": answer, "kind": "exists", "hops": 0, "target": target}

    records = [
        made("unrouted", None, "refer", [box(0.9, 0), box(0.8, 1), box(0.7, 2), box(0.0, 2, "b")]),
        made("unrouted", None, "yes/no", [word("yes", "yes"), word("no", "no")]),
        made("pdrop routed", 64, "refer", [box(0.9, 0), box(0.5, 1), box(0.4, 2), box(0.0, 2)]),
        made("pdrop routed", 64, "yes/no", [word("yes", "yes"), word("yes", "no")]),
    ]
    assert score(records, "unrouted", None).near is None
    columns = markdown_table(records).splitlines()[0].count("|")
    near = [word("yes", "yes"), word("no", "no"), word("yes", "no")]
    records += [made("unrouted", None, "near misses", near), made("pdrop routed", 64, "near misses", near)]
    assert all(line.count("|") == columns + 1 for line in markdown_table(records).splitlines())
    assert score(records, "pdrop routed", 64).near.mean == pytest.approx(2 / 3)
    found = score(records, "pdrop routed", 64)
    assert found.accuracy == share([True, True, False, False])
    assert found.overlap.mean == pytest.approx(0.45)
    assert (found.right.mean, found.yes_no.precision, found.yes_no.recall) == (0.5, 0.5, 1.0)
    assert found.agreement.mean == pytest.approx(4 / 6)
    assert score(records, "pdrop routed", 64, hops=2).accuracy.mean == 0


def test_tokens_on_a_box():
    on = tokens_on((0.25, 0.5, 0.75, 1.0), 4).view(4, 4)
    assert on.nonzero().tolist() == [[2, 1], [2, 2], [3, 1], [3, 2]]


def test_recovery_is_counted():
    kept = [torch.tensor(row, dtype=torch.bool) for row in ([1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1])]
    first, second, third = recovery(kept, (0.5, 0.0, 1.0, 1.0))  # tokens 1 and 3
    assert (first.kept, first.kept_target, first.out, first.back) == (2, 1, 0, 0)
    assert (second.out, second.out_target, second.back, second.back_target) == (2, 1, 1, 0)
    assert (third.kept_target, third.back, third.back_target) == (1, 1, 1)
    assert recovery([], (0, 0, 1, 1)) == []


@STUDY
def test_chance_selects_by_chance(checkpoint):
    """Other tokens with another seed, the same with the same; as many as by score."""
    loaded = reroute_fx.loading.models_by_name.load_model(str(checkpoint), "cpu", "float32")
    routed = reroute_fx.compile(loaded.model, 2 / 9, method="fastv", backend="eager")
    inputs = make_inputs(loaded.processor, collect("test", 0, 2, "refer"))

    def kept(seed):
        with torch.no_grad(), RandomScores(seed):
            return torch.stack(list(routed(**inputs).routing.all_kept.values()))

    with torch.no_grad():
        by_score = torch.stack(list(routed(**inputs).routing.all_kept.values()))
    assert torch.equal(kept(1), kept(1))
    assert not torch.equal(kept(1), kept(2))
    assert torch.equal(kept(1).sum(-1), by_score.sum(-1))
    overlap = (kept(1) & by_score).sum() / by_score.sum()
    assert overlap < 0.5


@STUDY
def test_pooling_to_every_token_is_the_unrouted_model(checkpoint, tmp_path, monkeypatch):
    loaded = reroute_fx.loading.models_by_name.load_model(str(checkpoint), "cpu", "float32")
    monkeypatch.setattr("contenders.TIERS", {128: 2 / 9})
    monkeypatch.setattr("contenders.POOLED", {128: (12, 12)})
    everyone = {contender.name: contender for contender in contenders(loaded.model, 0, tmp_path)}
    prompts = collect("test", 0, 4, "refer") + collect("test", 0, 4, "yes/no")
    assert len(prompts) <= BATCH
    inputs = make_inputs(loaded.processor, prompts)
    (unrouted, _), (pooled, _) = (everyone[name].answer(inputs) for name in ("unrouted", "average pooling"))
    texts = [loaded.processor.batch_decode(t, skip_special_tokens=True) for t in (unrouted, pooled)]
    assert texts[0] == texts[1]


def test_what_was_asked_at_other_tiers_is_kept(monkeypatch, tmp_path):
    """A study that is asked tier by tier ends up with every tier, and asks nothing twice."""
    asked = []

    def note(contender, processor, prompts, seed, kind):
        asked.append((contender.name, contender.tier))
        return {"contender": contender.name, "tier": contender.tier, "seed": seed, "kind": kind}

    everyone = [Contender("unrouted", None, None), *(Contender("pdrop routed", t, None) for t in (128, 64))]
    monkeypatch.setattr("evaluate.record", note)
    monkeypatch.setattr("evaluate.contenders", lambda *_: everyone)
    first = evaluate.run(None, None, [0], 1, tmp_path, (64,))
    assert set(asked) == {("unrouted", None), ("pdrop routed", 64)}
    asked.clear()
    both = evaluate.run(None, None, [0], 1, tmp_path, (128,), first)
    assert set(asked) == {("pdrop routed", 128)}
    assert [each["tier"] for each in both] == [None] * 3 + [128] * 3 + [64] * 3


def test_missing_and_other_checkpoints_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected 'demo', a model id, or a folder with config, weights"):
        evaluate.main(tmp_path / "nowhere", tmp_path, seeds=1, count=1)
    model = build_model(build_processor(), seed=0)
    model.config.vision_config.image_size = 28
    with pytest.raises(UnsupportedModelError, match="expected a LLaVA for 168 pixels"):
        evaluate._check(model)
    assert not list(tmp_path.iterdir())
