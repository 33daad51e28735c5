"""Every routed configuration of the official release, against what the release computes."""

import json
from itertools import product

import pytest
import torch
from golden_models import GOLDEN
from suite_tiers import one

import reroute_fx
from reroute_fx import Savings

MODELS = {"llava": "llava", "qwen2_5_vl": "qwen"}
CASES = [
    (model, case)
    for model in MODELS
    for case in json.loads((GOLDEN / model / "cases.json").read_text())["cases"]
    if case != "vanilla"
]
LOGITS = 1e-4
"""Allowed error of the last logits. Float32 noise is near 1e-5, a wrong selection moves them by 1e-2 and more."""


def generate(model, inputs):
    done = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    return done[0, -8:].int()


def check(golden, case, backend, savings=None):
    routed = reroute_fx.compile(golden.model, config=golden.config(case), backend=backend, savings=savings)
    with torch.no_grad():
        output = routed(**golden.inputs)
    wanted = golden.cases[case]
    assert list(output.routing.kv_lengths[0]) == wanted["kv_lengths"]
    assert [layer.keys.shape[2] for layer in output.past_key_values.layers] == wanted["kv_lengths"]
    for layer, kept in golden.selected(case).items():
        assert torch.equal(output.routing.selected[layer][0], kept)
        torch.testing.assert_close(
            output.routing.scores[layer][0], golden.expected[f"{case}/scores.{layer}"], atol=1e-6, rtol=1e-4
        )
    error = (output.logits[0, -1] - golden.expected[f"{case}/last_logits"]).abs().max()
    assert error < LOGITS
    assert torch.equal(generate(routed, golden.inputs), golden.expected[f"{case}/generated"])


def test_all_36_routed_configurations_are_there():
    assert len(CASES) == 36


@pytest.mark.parametrize("model", MODELS)
def test_unrouted_model_matches(model, request):
    golden = request.getfixturevalue(MODELS[model])
    with torch.no_grad():
        logits = golden.model(**golden.inputs).logits[0, -1]
    assert (logits - golden.expected["vanilla/last_logits"]).abs().max() < LOGITS
    assert torch.equal(generate(golden.model, golden.inputs), golden.expected["vanilla/generated"])


@pytest.mark.parametrize(("model", "case"), CASES)
def test_eager_matches_the_release(model, case, request):
    check(request.getfixturevalue(MODELS[model]), case, "eager")


SELECTION = [
    (model, f"{method}-{action}-{tier}")
    for model, (method, action, tier) in product(
        MODELS,
        [
            ("pdrop", "physical_delete", 192),
            ("fastv", "compact_route", 64),
            ("pdrop", "compact_route_stagewise", 128),
        ],
    )
]


@one("2 s each")
@pytest.mark.parametrize(("model", "case"), SELECTION)
def test_eager_without_savings_matches_the_release(model, case, request):
    savings = Savings(restore_in_place=False)
    check(request.getfixturevalue(MODELS[model]), case, "eager", savings)


@pytest.mark.full("20 s to 70 s each; all 36 run in eager, and test_routed_model.py compiles")
@pytest.mark.parametrize(("model", "case"), CASES)
def test_inductor_matches_the_release(model, case, request):
    check(request.getfixturevalue(MODELS[model]), case, "inductor")


def batch_around(golden, side):
    """The golden prompt as row 2 of a padded batch; the others are text, a shorter and a longer prompt."""
    ids = golden.inputs["input_ids"][0]
    rows = [
        ids[-20:],
        torch.cat([ids[:-14], torch.tensor([11, 23, 47, 5])]),
        ids,
        torch.cat([ids[:-1], torch.tensor([211, 7, 29, 86, 140, 33])]),
    ]
    width = max(map(len, rows))
    inputs = {name: torch.zeros(4, width, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if side == "left" else slice(len(row))
        inputs["input_ids"][i, columns], inputs["attention_mask"][i, columns] = row, 1
    for name in {"pixel_values", "image_grid_thw"} & golden.inputs.keys():
        inputs[name] = torch.cat([golden.inputs[name]] * 3)
    if "mm_token_type_ids" in golden.inputs:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == golden.model.config.image_token_id).long()
    return inputs


@one("3 s each")
@pytest.mark.parametrize(
    "case", ["pdrop-physical_delete-192", "pdrop-compact_route-128", "fastv-compact_route_stagewise-64"]
)
@pytest.mark.parametrize("model", MODELS)
def test_a_row_of_a_padded_batch_matches_the_release(model, case, request):
    golden, row = request.getfixturevalue(MODELS[model]), 2
    routed = reroute_fx.compile(golden.model, config=golden.config(case), backend="eager")
    wanted = golden.cases[case]
    for side in ("left", "right"):
        inputs = batch_around(golden, side)
        with torch.no_grad():
            output = routed(**inputs)
        assert list(output.routing.kv_lengths[row]) == wanted["kv_lengths"]
        for layer, kept in golden.selected(case).items():
            selected, scores = (rows[layer][row] for rows in (output.routing.selected, output.routing.scores))
            assert torch.equal(selected, kept)
            torch.testing.assert_close(
                scores, golden.expected[f"{case}/scores.{layer}"], atol=1e-6, rtol=1e-4
            )
        last = int(inputs["attention_mask"][row].nonzero().max())
        error = (output.logits[row, last] - golden.expected[f"{case}/last_logits"]).abs().max()
        assert error < LOGITS
        generated = routed.generate(
            **inputs, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert torch.equal(generated[row, -8:].int(), golden.expected[f"{case}/generated"])
