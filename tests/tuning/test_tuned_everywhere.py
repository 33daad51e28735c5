"""What `tune` wrote for the model that ships, through each way to run programs: the same tokens are kept."""

import functools
from pathlib import Path

import pytest
import torch
from contenders import make_inputs
from transformers import LlavaForConditionalGeneration

import reroute_fx
from reroute_fx.grounding.questions import KINDS, collect
from reroute_fx.loading.models_by_name import DEMO, load_model

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
COUNT = 4


@functools.cache
def demo():
    return load_model(DEMO, "cpu", "float32")


@functools.cache
def inputs():
    return make_inputs(demo().processor, collect("test", 0, COUNT, KINDS[0]))


@functools.cache
def model_for(way):
    """The one that ships; its tower can't be exported (docs/artifacts.md), that of its kind with random weights can."""
    if way == "inductor":
        return demo().model
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(demo().model.config).eval()


def lowered(config, way, folder):
    if way == "inductor":
        return reroute_fx.compile(model_for(way), config=config)
    eager = reroute_fx.compile(model_for(way), config=config, backend="eager")
    reroute_fx.export(eager, folder / "artifact")
    return reroute_fx.load(folder / "artifact")


@pytest.mark.full("30 s to 120 s each; test_rules_everywhere.py has rules on a model of three layers")
@pytest.mark.parametrize("tier", [192, 128, 64])
@pytest.mark.parametrize("way", ["inductor", "artifact"])
@torch.no_grad()
def test_a_tuned_file_keeps_the_same_tokens(tmp_path, tier, way):
    file = RESULTS / f"tuned_{tier}.json"
    eager = reroute_fx.compile(model_for(way), config=file, backend="eager")
    routed = lowered(file, way, tmp_path)
    expected, found = eager(**inputs()), routed(**inputs())
    assert list(found.routing.selected) == list(eager.routing_config.decision_layers)
    for layer, kept in expected.routing.selected.items():
        assert [each.tolist() for each in found.routing.selected[layer]] == [each.tolist() for each in kept]
    greedy = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(routed.generate(**inputs(), **greedy), eager.generate(**inputs(), **greedy))
