"""What is left out while a decoder is traced: switches that change nothing, patches of other models, collections."""

import gc
import sys

import pytest
import torch
from transformers.exporters import exporter_dynamo  # noqa: F401 (it registers its patches)
from transformers.exporters import utils as exporting
from transformers.models.llama import modeling_llama

from reroute_fx._compat import _patches_of_loaded_models
from reroute_fx.capture.tracing import GradModeStays, keeping_grad_mode
from reroute_fx.common.collecting import without_collecting


class Rotating(torch.nn.Module):
    """Switches gradients off in its middle, as rotary embeddings of transformers do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            angles = x.cos()
        return x * angles


def switches(program):
    names = (str(node.target) for node in program.graph.nodes if node.op == "call_function")
    return [name for name in names if "grad" in name]


def test_a_program_has_no_switch_that_changes_nothing():
    x, module = torch.randn(3), Rotating()
    expected = module(x)
    keeping_grad_mode(module)
    with torch.no_grad():
        program = torch.export.export(module, (), {"x": x})
    assert switches(program) == []
    torch.testing.assert_close(program.module()(x=x), expected)


def test_a_switch_that_changes_something_stays():
    module = Rotating()
    keeping_grad_mode(module)
    with torch.enable_grad():
        program = torch.export.export(module, (), {"x": torch.randn(3)})
    assert switches(program)
    with torch.no_grad(), GradModeStays():
        with torch.enable_grad():
            assert torch.is_grad_enabled()
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_patches_of_models_that_nobody_imported_are_left_out(monkeypatch):
    here, nowhere = "transformers.models.llama.modeling_llama", "transformers.models.nobody.modeling_nobody"
    asked = [(here, "a", id), (f"{here}.LlamaModel", "b", id), (nowhere, "c", id), ("torch.Tensor", "d", id)]
    monkeypatch.setitem(exporting._PATCHES, "dynamo", asked)
    with _patches_of_loaded_models():
        assert modeling_llama.__name__ == here
        assert exporting._PATCHES["dynamo"] == [asked[0], asked[1], asked[3]]
    assert exporting._PATCHES["dynamo"] is asked


def test_the_exporter_has_patches_of_models_and_finds_them_there():
    everything = {path for path, *_ in exporting._PATCHES["dynamo"]}
    with _patches_of_loaded_models():
        left = {path for path, *_ in exporting._PATCHES["dynamo"]}
    assert {path for path in everything if not path.startswith("transformers.models.")} <= left
    assert everything - left
    assert all(".".join(path.split(".")[:4]) not in sys.modules for path in everything - left)


def test_nothing_is_collected_meanwhile_and_again_afterwards():
    seen = []

    @without_collecting()
    def inner():
        seen.append(gc.isenabled())
        raise KeyError

    @without_collecting()
    def outer():
        with pytest.raises(KeyError):
            inner()
        seen.append(gc.isenabled())

    outer()
    assert seen == [False, False]
    assert gc.isenabled()
