"""The command line, on published configurations without weights."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import reroute_fx
from reroute_fx.cli import app

PUBLISHED = Path(__file__).parent / "published"
GIB = 2**30


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("name", "layers", "decision_layers", "teraflops"),
    [
        ("llava-1.5-7b", 32, [2, 7, 15, 23], 8.18),
        ("llava-1.5-13b", 40, [2, 9, 19, 29], 15.94),
        ("qwen2.5-vl-72b", 80, [5, 17, 37, 57], 87.50),
    ],
)
def test_inspect_needs_no_weights(name, layers, decision_layers, teraflops):
    command = [sys.executable, "-m", "reroute_fx.cli", "inspect", str(PUBLISHED / f"{name}.json"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert len(report["tokens_per_layer"]) == layers
    assert report["config"]["decision_layers"] == decision_layers
    assert abs(report["average_tokens"] - 128) < 1
    assert report["unrouted"]["flops"] / 1e12 == pytest.approx(teraflops, abs=0.005)
    passes = {result["name"]: result for result in report["passes"]}
    assert passes["FindLayers"]["matched"] == layers
    assert passes["RouteStages"]["rewritten"] == layers - decision_layers[0]
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 4 * GIB


def test_inspect_prints_a_table(tmp_path):
    config = json.loads((PUBLISHED / "llava-1.5-7b.json").read_text())
    config["text_config"] |= {"num_hidden_layers": 8, "hidden_size": 256, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run("inspect", str(tmp_path), "--tier", "0.5", "--visual-tokens", "100", "--text-tokens", "10")
    assert result.exit_code == 0
    assert "100 visual and 10 text tokens" in result.stdout
    assert "LlavaForConditionalGeneration" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere/config.json"], "ConfigError: model is 'nowhere/config.json'"),
        (["inspect", str(PUBLISHED / "llava-1.5-7b.json"), "--tier", "100"], "ConfigError: tier is 100"),
        (
            ["inspect", str(PUBLISHED / "llava-1.5-7b.json"), "--action", "drop"],
            "ConfigError: action is 'drop'",
        ),
        (["demo", "--backend", "tpu"], "ConfigError: backend is 'tpu'"),
    ],
)
def test_errors_are_one_clear_line(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_text_model_is_refused(tmp_path):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run("inspect", str(tmp_path))
    assert result.exit_code == 2
    assert "UnsupportedModelError" in result.stderr


def test_configs_lists_the_release():
    records = json.loads(run("configs", "--json").stdout)
    assert [r["name"] for r in records] == [entry.name for entry in reroute_fx.paper_configs()]
    table = run("configs").stdout
    assert "84.1" in table
    assert "llava15, 7B decoder" in table
    assert table.count("baseline") == 2
