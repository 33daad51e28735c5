"""Every routed configuration of the official release, against what the release computes."""

import json
from itertools import product

import pytest
import torch
from golden_models import GOLDEN

import reroute_fx

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


def check(golden, case, backend):
    routed = reroute_fx.compile(golden.model, config=golden.config(case), backend=backend)
    with torch.no_grad():
        output = routed(**golden.inputs)
    wanted = golden.cases[case]
    assert output.routing.kv_lengths == wanted["kv_lengths"]
    assert [layer.keys.shape[2] for layer in output.past_key_values.layers] == wanted["kv_lengths"]
    for layer in wanted["decision_layers"]:
        assert torch.equal(
            output.routing.selected[layer][0].int(), golden.expected[f"{case}/selected.{layer}"]
        )
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


@pytest.mark.parametrize(
    ("model", "case"),
    [
        (model, f"{method}-{action}-{tier}")
        for model, (method, action, tier) in product(
            MODELS,
            [
                ("pdrop", "physical_delete", 192),
                ("fastv", "compact_route", 64),
                ("pdrop", "compact_route_stagewise", 128),
            ],
        )
    ],
)
def test_inductor_matches_the_release(model, case, request):
    check(request.getfixturevalue(MODELS[model]), case, "inductor")
