"""What `benchmarks/prefill.py` compares computes the same: decoders of several kinds and the programs made of them."""

import pytest
import torch

from reroute_fx import RoutingConfig
from reroute_fx.capture import capture_decoder
from reroute_fx.passes.tensor_names import GROUPS, addend_input

LAYERS = 6
TAKEN = {"llava": set(), "qwen3-vl": {*map(addend_input, range(3))}, "gemma-3": {GROUPS}}
"""What programs take besides embeddings and positions."""


TAKES_LESS = pytest.mark.full("5 s; Gemma 3, which takes most besides embeddings, is tested in the gate")


@pytest.mark.parametrize(
    "name",
    ["gemma-3", pytest.param("qwen3-vl", marks=TAKES_LESS), pytest.param("llava", marks=TAKES_LESS)],
)
def test_contenders_compute_the_same(name, benchmark_module):
    chosen, decoders = benchmark_module("prefill").DECODERS[name], benchmark_module("decoders")
    model = chosen.build(256, LAYERS)
    captured = capture_decoder(model)
    prompts = decoders.Prompts.of(model, captured, 1, chosen.pictures, 40)
    _check_prompts(name, prompts)
    with torch.no_grad():
        theirs = model.model.language_model(
            inputs_embeds=prompts.embeds, position_ids=prompts.positions, use_cache=True, **prompts.of_decoder
        ).past_key_values
    ours = decoders.Prefill(captured, None, backend="eager")(prompts)
    for expected, found in zip(theirs.layers, ours.layers, strict=True):
        # A layer with a window keeps the last tokens only.
        kept = expected.keys.shape[2]
        torch.testing.assert_close(found.keys[:, :, -kept:], expected.keys, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(found.values[:, :, -kept:], expected.values, atol=2e-5, rtol=1e-4)
    config = RoutingConfig.from_tier(128, num_layers=LAYERS)
    routed = decoders.Prefill(captured, config, backend="eager")(prompts)
    assert [layer.keys.shape[2] - 40 for layer in routed.layers] == [*config.tokens_per_layer(LAYERS, 576)]


def _check_prompts(name, prompts):
    assert prompts.of_programs.keys() == TAKEN[name]
    assert prompts.is_visual.sum() == 576
    if name == "gemma-3":
        assert prompts.of_programs[GROUPS].unique(return_counts=True)[1].tolist() == [40, *[144] * 4]
        window = prompts.of_decoder["attention_mask"]["sliding_attention"]
        assert not window[0, 0, -1, :-256].any()
        assert window[0, 0, -1, -256:].all()
