"""Prompts to profile and tune on: pairs, processor outputs and files."""

import json

import pytest
import torch
from tiny_models import IMAGE, collate, llava_image, make_row, tiny_llava

from reroute_fx.errors import InputError
from reroute_fx.loading.models_by_name import load_model
from reroute_fx.loading.sample_picture import picture
from reroute_fx.tuning.read_prompts import (
    count_rows,
    demo_prompts,
    hash_prompts,
    read_prompt_file,
    read_prompts,
)


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


@pytest.fixture(scope="module")
def demo():
    return load_model("demo", "cpu", "float32")


def prompt(model, *texts, seed=0, side="left", extra=0):
    """A batch with a row for each length of the text behind its picture."""
    random = torch.Generator().manual_seed(seed)
    rows = [make_row(random, (2, text), [llava_image(random)]) for text in texts]
    return collate(model, rows, side, extra)


def test_processor_outputs_stay_as_they_are(model):
    given = [prompt(model, 3, 5), prompt(model, 4)]
    batches = read_prompts(model, given, least=3)
    assert count_rows(batches) == 3
    for batch, inputs in zip(batches, given, strict=True):
        assert batch.keys() == inputs.keys()
        assert all(torch.equal(batch[name], inputs[name]) for name in inputs)


def test_pairs_become_batches_that_are_padded_in_front(demo):
    batches = read_prompts(demo.model, demo_prompts(9), demo.processor, rows=4)
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 1]
    assert all(batch["attention_mask"][:, -1].all() for batch in batches)
    assert not batches[0]["attention_mask"].all()
    alone = read_prompts(demo.model, demo_prompts(9), demo.processor)
    lengths = [int(row.sum()) for batch in batches for row in batch["attention_mask"]]
    assert lengths == [batch["input_ids"].shape[1] for batch in alone]


def test_the_hash_tells_prompts_apart(model):
    first = hash_prompts([prompt(model, 3)])
    assert first == hash_prompts([prompt(model, 3)])
    assert len({first, hash_prompts([prompt(model, 4)]), hash_prompts([prompt(model, 3, seed=1)])}) == 3


def test_a_file_of_prompts(tmp_path, demo):
    (tmp_path / "pictures").mkdir()
    picture(1).save(tmp_path / "pictures" / "one.png")
    line = json.dumps({"image": "pictures/one.png", "text": "Where is the star?"})
    (tmp_path / "prompts.jsonl").write_text(f"{line}\n\n{line}\n")
    pairs = read_prompt_file(tmp_path / "prompts.jsonl")
    assert pairs == [(tmp_path / "pictures" / "one.png", "Where is the star?")] * 2
    (batch,) = read_prompts(demo.model, pairs, demo.processor, rows=2, least=2)
    expected = read_prompts(demo.model, [(picture(1), "Where is the star?")], demo.processor, least=1)
    assert torch.equal(batch["pixel_values"][1:], expected[0]["pixel_values"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "a.png"}', "line 2"),
        ('{"image": "a.png", "text": 3}', "line 2"),
        ("a.png: What?", "line 2"),
    ],
)
def test_another_line_is_refused_with_its_number(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"image": "a.png", "text": "What?"}}\n{line}\n')
    with pytest.raises(InputError, match=message):
        read_prompt_file(path)


def test_a_file_that_is_missing_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected a file"):
        read_prompt_file(tmp_path / "none.jsonl")


def refused(model, prompts, message, **options):
    with pytest.raises(InputError, match=message):
        read_prompts(model, prompts, **options)


def test_what_is_no_list_of_prompts_is_refused(model):
    one = prompt(model, 3)
    refused(model, one, "prompts is a dict; expected a list")
    refused(model, [one, "What?"], r"prompts\[1\] is a str without input_ids", least=1)
    refused(model, [one, (picture(0), "What?")], "expected one kind", least=1)
    refused(model, [(picture(0), "What?")], "no processor", least=1)


def test_pairs_of_something_else_are_refused(demo):
    refused(
        demo.model, [("What?", picture(0))], r"prompts\[0\] is \(str, ", processor=demo.processor, least=1
    )


def test_too_few_prompts_are_refused(model):
    refused(model, [prompt(model, 3, 4)] * 3, "has 6 prompts; expected at least 8")


def test_prompts_without_pictures_are_refused(model):
    with_picture = prompt(model, 3, 4)
    text = {name: with_picture[name] for name in ("input_ids", "attention_mask")}
    text["input_ids"] = text["input_ids"].where(text["input_ids"] != IMAGE, 5)
    refused(model, [with_picture, text], r"prompts\[1\]: rows \[0, 1\] have no picture", least=1)
    half = dict(with_picture)
    half["input_ids"] = half["input_ids"].clone()
    half["input_ids"][1] = 5
    half["pixel_values"] = half["pixel_values"][:1]
    refused(model, [half], r"prompts\[0\]: rows \[1\] have no picture", least=1)


def test_padding_behind_prompts_is_refused(model):
    refused(model, [prompt(model, 3, side="right", extra=2)], "padding behind the prompt", least=1)


def test_what_a_routed_model_refuses_is_refused_with_the_number_of_the_prompt(model):
    broken = prompt(model, 3)
    broken["attention_mask"] = broken["attention_mask"] * 2
    refused(model, [prompt(model, 3), broken], r"prompts\[1\]: attention_mask holds values other", least=1)
