"""Configurations as JSON files: one form, in artifacts, reports and files; what is wrong is named."""

import json
from dataclasses import replace

import pytest
import torch
from conversations import unrouted_model

import reroute_fx
from reroute_fx import ConfigError, InputError, RoutingConfig
from reroute_fx.config.choosing import read_config
from reroute_fx.methods import all_methods

PDROP = RoutingConfig((2, 7), (0.5, 1 / 3))


@pytest.fixture
def file(tmp_path):
    """Writes a file, text as it is and all else as JSON."""

    def write(content):
        path = tmp_path / "config.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return path

    return write


@pytest.mark.parametrize(
    "config",
    [
        PDROP,
        RoutingConfig((), method="none"),
        RoutingConfig((3,), keep_tokens=(9,), pool="image", scoring="previous", seed=7),
        *(RoutingConfig.from_tier(192, method.name) for method in all_methods()),
    ],
    ids=lambda config: f"{config.method} {config.decision_layers}",
)
def test_they_come_back_as_they_were(config, tmp_path):
    config.save(tmp_path / "config.json")
    loaded = RoutingConfig.load(tmp_path / "config.json")
    assert loaded == config == RoutingConfig.from_dict(config.to_dict())
    assert loaded.to_dict() == json.loads((tmp_path / "config.json").read_text())
    if config.method != "none":
        assert loaded.definition is config.definition


def test_fields_with_defaults_may_be_left_out(file):
    assert RoutingConfig.load(file({"decision_layers": [2, 7], "keep_ratios": [0.5, 1 / 3]})) == PDROP
    assert RoutingConfig.from_dict({"decision_layers": (2,), "keep_ratios": (1,)}).keep_ratios == (1.0,)


PDROP_WITH = {"decision_layers": [2, 7], "keep_ratios": [0.5, 0.25]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**PDROP_WITH, "tier": 64}, "tier is 64, but a RoutingConfig has no such field; expected some of"),
        ({"keep_ratios": [0.5]}, r"decision_layers is missing; expected it beside \['keep_ratios'\]"),
        (
            {**PDROP_WITH, "decision_layers": [2, "7"]},
            r"decision_layers\[1\] is '7'; expected a valid integer",
        ),
        ({**PDROP_WITH, "decision_layers": 2}, "decision_layers is 2; expected a valid array"),
        ({**PDROP_WITH, "keep_ratios": ["0.5", 0.25]}, r"keep_ratios\[0\] is '0.5'; expected a valid number"),
        (
            {**PDROP_WITH, "keep_ratios": [0.5, 2.0]},
            r"keep_ratios is \[0.5, 2.0\]; expected Python numbers in",
        ),
        ({**PDROP_WITH, "keep_ratios": [0.5, float("nan")]}, r"keep_ratios is \[0.5, nan\]; expected"),
        ({**PDROP_WITH, "seed": True}, "seed is True; expected a valid integer"),
        ({**PDROP_WITH, "method": "magic"}, "method is 'magic'; expected one of"),
        ({**PDROP_WITH, "method": None}, "method is None; expected a valid string"),
        ([PDROP_WITH], "found .*; expected an object with fields of a RoutingConfig"),
        (None, "found None; expected an object"),
        (b"", "found no JSON; expected an object with fields of a RoutingConfig. EOF"),
        (b"{" * 100_000, "found no JSON"),
        (b"\xff\xfe", "found no JSON"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(file, content, message):
    path = file(content)
    with pytest.raises(ConfigError, match=rf"{path}: {message}"):
        RoutingConfig.load(path)
    if isinstance(content, dict):
        with pytest.raises(ConfigError, match=rf"config: {message}"):
            RoutingConfig.from_dict(content)


def test_what_is_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(
            ConfigError, match=f"config is '{path}'; expected a JSON file with a RoutingConfig"
        ):
            RoutingConfig.load(path)
    with pytest.raises(
        ConfigError, match=r"config can't be written as JSON: .* serializable; expected plain values"
    ):
        RoutingConfig.from_dict({**PDROP_WITH, "seed": torch.tensor(1)})
    with pytest.raises(InputError, match="expected the name of a file in an existing folder"):
        PDROP.save(tmp_path / "none" / "config.json")


def test_wherever_a_config_is_taken_a_path_is_too(file):
    """By `inspect`, and so by `compile`; the passes on their own read it in the same way."""
    config = RoutingConfig((1, 2), (0.5, 0.25), "physical_delete")
    path = file(config.to_dict())
    model = unrouted_model("llava")
    assert reroute_fx.inspect(model, config=str(path)).config == config
    for take in (reroute_fx.inspect, reroute_fx.compile):
        with pytest.raises(
            ConfigError, match="config is given together with tier=64; expected one or the other"
        ):
            take(model, 64, config=path)
        with pytest.raises(
            ConfigError, match="config is a dict; expected a RoutingConfig, or the path of a JSON"
        ):
            take(model, config=config.to_dict())
    assert read_config(path) == read_config(str(path)) == read_config(config) == config
    with pytest.raises(ConfigError, match=f"config is '{path}x'"):
        reroute_fx.route(None, f"{path}x")


def test_a_file_for_another_depth_is_refused(file):
    deep = replace(PDROP, decision_layers=(2, 70))
    with pytest.raises(ConfigError, match=r"decision_layers has \[70\]"):
        reroute_fx.inspect(unrouted_model("llava"), config=file(deep.to_dict()))
