"""Another transformers is refused at import: hooks that it no longer calls would let wrong results through."""

import subprocess
import sys
from importlib.metadata import requires

import pytest
from packaging.requirements import Requirement
from tiny_models import tiny_llava
from transformers import DynamicCache, GenerationMixin, __version__
from transformers.cache_utils import DynamicLayer
from transformers.exporters import exporter_dynamo

import reroute_fx
from reroute_fx._compat import check_transformers
from reroute_fx.errors import BackendUnavailableError


@pytest.mark.full("17 s; starts processes")
def test_a_hook_that_was_renamed_is_told_at_import():
    code = (
        "from transformers import GenerationMixin\n"
        "GenerationMixin._make_cache = GenerationMixin._prepare_cache_for_generation\n"
        "del GenerationMixin._prepare_cache_for_generation\n"
        "from reroute_fx import compile"
    )
    told = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True).stderr
    assert f"BackendUnavailableError: transformers is {__version__}, in which GenerationMixin has no" in told
    assert (
        "method _prepare_cache_for_generation; routed models need what they know. Install transformers"
        in told
    )
    assert "<5.24" in told


class OtherLayer(DynamicLayer):
    def __init__(self):
        self.values, self.is_initialized = None, False

    keys = property()


class OtherGeneration(GenerationMixin):
    def generate(self, inputs):
        return self._expand_inputs_for_generation(), self._prepare_position_ids_for_generation()


@pytest.mark.parametrize(
    ("place", "other", "message"),
    [
        (
            (GenerationMixin, "_prepare_cache_for_generation"),
            lambda self, model_kwargs, generation_config: None,
            "_prepare_cache_for_generation takes model_kwargs, generation_config; expected "
            "generation_config, model_kwargs, generation_mode first",
        ),
        (
            (GenerationMixin, "_expand_multimodal_outputs"),
            None,
            "GenerationMixin has no method _expand_multimodal_outputs",
        ),
        (
            (GenerationMixin, "generate"),
            OtherGeneration.generate,
            "GenerationMixin.generate does not call _prepare_cache_for_generation",
        ),
        (
            (DynamicCache, "crop"),
            lambda self, maximum_length: None,
            "DynamicCache.crop takes maximum_length; expected tokens_to_remove first",
        ),
        (
            (reroute_fx._compat, "DynamicLayer"),
            OtherLayer,
            "OtherLayer has no attribute keys",
        ),
    ],
)
def test_what_changed_is_named(monkeypatch, place, other, message):
    check_transformers()
    monkeypatch.setattr(*place, other)
    with pytest.raises(BackendUnavailableError, match=message):
        check_transformers()


def test_this_transformers_is_in_the_declared_range():
    (line,) = (line for line in requires("reroute-fx") if line.startswith("transformers"))
    assert __version__ in Requirement(line).specifier


@pytest.mark.usefixtures("no_traces")
@pytest.mark.parametrize("name", ["DynamoConfig", "DynamoExporter"])
def test_another_exporter_is_told(monkeypatch, name):
    monkeypatch.delattr(exporter_dynamo, name)
    with pytest.raises(BackendUnavailableError, match=f"the exporter is another one .*{name}.*Install"):
        reroute_fx.compile(tiny_llava(), backend="eager")
