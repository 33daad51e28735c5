"""Transformers' own tests over routed models: what was recorded, and that the recording tells passes from refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import transformers_suite as suite  # noqa: E402

RECORD = json.loads((BENCHMARKS / "results" / "transformers_suite.json").read_text())


def test_every_result_is_a_pass_or_a_documented_refusal():
    others = {
        node: how
        for node, how in RECORD["tests"].items()
        if how["outcome"] not in ("pass", "nothing routed") and not is_documented(how)
    }
    assert others == {}


def is_documented(how):
    is_ours = how["error"].endswith("Error") and how["outcome"] == "refusal"
    return is_ours and any(said in how["message"] for said in suite.DOCUMENTED)


def test_counts_are_those_of_the_results():
    assert RECORD["counts"] == suite.counts(RECORD["tests"])
    for family in RECORD["counts"].values():
        assert family["failure"] == 0
        assert family["pass"] >= 18
        assert family["pass"] + family["nothing routed"] >= 102
    assert RECORD["tests"].keys() == {node for node in RECORD["tests"] if node.startswith("tests/models/")}


def test_the_record_is_of_these_scripts():
    assert RECORD["scripts"] == suite.script_hash()
    assert RECORD["environment"]["transformers"]
    assert RECORD["date"] >= "2026-01-01"


EXAMPLES = """
from conversations import SINGLE, batch, build, unrouted_model
from tiny_models import llava_config
from transformers import LlavaForConditionalGeneration

def test_passes():
    model, inputs = unrouted_model("llava"), batch("llava", *SINGLE)
    assert model(**inputs).routing.kv_lengths

def test_is_refused():
    routed = build("llava").eval()
    routed(**batch("llava", *SINGLE), output_attentions=True)

def test_fails():
    assert not hasattr(build("llava").eval()(**batch("llava", *SINGLE)), "routing")

def test_routes_nothing():
    assert LlavaForConditionalGeneration(llava_config(2)).train().training
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """How the examples end under the plugin."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "test_examples.py").write_text(EXAMPLES)
    paths = os.pathsep.join((str(BENCHMARKS), str(Path(__file__).parent)))
    out = folder / "outcomes.json"
    variables = {
        "PYTEST_ADDOPTS": "",
        "PYTHONPATH": paths,
        "ROUTED_SUITE_OUT": str(out),
        "ROUTED_SUITE_ROUTE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "routed_suite", "-p", "no:cacheprovider"]
    subprocess.run(
        [*command, "test_examples.py"], cwd=folder, env={**os.environ, **variables}, check=False, timeout=600
    )
    return {node.partition("::")[2]: suite.outcome(how) for node, how in json.loads(out.read_text()).items()}


@pytest.mark.full("runs pytest in a process of its own; it guards a measurement, no product code")
def test_the_recording_tells_outcomes_apart(outcomes):
    assert {name: how["outcome"] for name, how in outcomes.items()} == {
        "test_passes": "pass",
        "test_is_refused": "refusal",
        "test_fails": "failure",
        "test_routes_nothing": "nothing routed",
    }
    assert outcomes["test_is_refused"]["error"] == "InputError"
    assert "output_attentions" in outcomes["test_is_refused"]["message"]


def test_a_test_that_did_not_run_is_a_failure():
    assert suite.outcome(None)["outcome"] == "failure"
    assert suite.outcome({"outcome": "skipped"})["outcome"] == "failure"
