"""What lmms-eval's arguments make of a model. lmms-eval itself is stood in for: it is not installed with the tests."""

import sys
import types
from importlib import import_module

import pytest
import torch

from reroute_fx import api
from reroute_fx.errors import ConfigError
from reroute_fx.loading.models_by_name import load_model

OFFERED = {
    "api.instance": ("GenerationResult", "Instance", "TokenCounts"),
    "api.model": ("lmms",),
    "protocol": ("ChatMessages",),
}


@pytest.fixture
def lmms(monkeypatch):
    """The module, and the device and routing that it asks for."""
    for name in ("lmms_eval", "lmms_eval.api"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, classes in OFFERED.items():
        module = types.ModuleType(f"lmms_eval.{name}")
        vars(module).update({each: type(each, (), {}) for each in classes})
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "reroute_fx.evals.lmms", raising=False)
    lmms = import_module("reroute_fx.evals.lmms")
    asked = {}

    def load(name, device, dtype, revision):
        asked.update(device=device, revision=revision)
        return load_model(name, "cpu", dtype)

    monkeypatch.setattr(lmms, "load_model", load)
    monkeypatch.setattr(api, "compile", lambda model, config, backend: asked.update(config=config))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    yield lmms, asked
    sys.modules.pop("reroute_fx.evals.lmms")


def test_the_number_of_a_gpu_is_kept(lmms):
    module, asked = lmms
    module.RerouteFx("demo", device="cuda:1")
    assert asked["device"] == "cuda:1"
    with pytest.raises(ConfigError, match="torch finds 2 GPUs"):
        module.RerouteFx("demo", device="cuda:2")


@pytest.mark.parametrize(
    ("method", "tier"), [("pdrop", None), ("fastv-official-k2", None), ("fastv-official-k2", "192")]
)
def test_without_a_tier_a_method_has_its_own(lmms, method, tier):
    module, asked = lmms
    module.RerouteFx("demo", method=method, action="physical_delete", **({"tier": tier} if tier else {}))
    expected = api.RoutingConfig.from_tier(
        float(tier) if tier else None, method, "physical_delete", num_layers=16
    )
    assert asked["config"] == expected


def test_routing_comes_from_a_file_and_the_model_from_a_revision(lmms, tmp_path):
    module, asked = lmms
    config = api.RoutingConfig((2, 5), (0.5, 0.25), pool="image")
    config.save(tmp_path / "config.json")
    module.RerouteFx("demo", config=str(tmp_path / "config.json"))
    assert asked["config"] == config
    assert (asked["device"], asked["revision"]) == ("cuda", None)
    module.RerouteFx("demo", pool="image", schedule="paper", tier=64)
    assert asked["config"] == api.RoutingConfig.from_tier(64, schedule="paper", pool="image", num_layers=16)
    with pytest.raises(ConfigError, match="revision is 'v1', but model is 'demo'"):
        module.RerouteFx("demo", revision="v1")
