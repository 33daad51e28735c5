"""What a decoder takes for each token besides its embedding: types of tokens for its experts, say."""

import pytest
import torch
from by_hand import by_hand

import reroute_fx
from reroute_fx import InputError, RoutingConfig
from reroute_fx.capture.token_inputs import TokenInput
from reroute_fx.runtime.buckets import pad_inputs
from reroute_fx.selection.row_plan import plan_rows

ROUTING = RoutingConfig((1, 2), (0.5, 0.25))
ACTIONS = ["compact_route_stagewise", "physical_delete"]
TOLERANCE = 1e-4
"""Of logits near 30 of weights ten times what is usual; another selection moves them by 1 and more."""

pytestmark = pytest.mark.usefixtures("no_gradients", "one_thread")


def test_what_a_call_gives_is_taken():
    embeds = torch.zeros(2, 5, 4)
    types, wide = TokenInput("types", dtype=torch.int64, is_optional=True), TokenInput("wide", (3, 2))
    assert torch.equal(types.take({}, embeds), torch.zeros(2, 5, dtype=torch.int64))
    given = torch.ones(2, 5, dtype=torch.int32)
    assert types.take({"types": given}, embeds).dtype is torch.int64
    with pytest.raises(
        InputError, match=r"got no wide; expected \[batch, length, 3, 2\] beside inputs_embeds"
    ):
        wide.take({}, embeds)


def test_they_are_padded_as_embeddings():
    plan = plan_rows(ROUTING, torch.arange(20)[None] < 16, [20], [[16]])
    given = {
        "inputs_embeds": torch.ones(1, 20, 4),
        "wide": torch.ones(1, 20, 3, 2),
        "types": torch.ones(1, 20),
    }
    padded = pad_inputs({**given, **plan.inputs}, ["wide", "types"])
    assert padded["wide"].shape == (1, 64, 3, 2)
    assert padded["types"].shape == (1, 64)
    for name, tensor in given.items():
        assert torch.equal(padded[name][:, :20], tensor)
        assert padded[name].sum() == tensor.sum()


@pytest.mark.full("10 s; the record of families has what is kept whole")
@pytest.mark.parametrize("action", ACTIONS)
def test_each_token_has_its_own_experts(benchmark_module, action):
    """In Ernie 4.5 VL, where the model sorts tokens by their types."""
    tiny = benchmark_module("tiny_families")
    family = tiny.FAMILIES["Ernie 4.5 VL"]
    model = family.build()
    model.set_attn_implementation({"text_config": "eager"})  # it returns maps
    config = RoutingConfig(ROUTING.decision_layers, ROUTING.keep_ratios, action)
    routed, given = reroute_fx.compile(model, config=config, backend="eager"), tiny.prompts(model, family)
    output, real = routed(**given), given["attention_mask"].bool()
    for number in range(2):
        logits, kept = by_hand(model, tiny.row(given, number), config)
        assert {layer: rows[number].tolist() for layer, rows in output.routing.selected.items()} == kept
        torch.testing.assert_close(output.logits[number, real[number]], logits[0], atol=TOLERANCE, rtol=0)
    plain = routed(**{**tiny.row(given, 0), "moe_mm_token_type_ids": None}).logits
    assert (plain[0] - output.logits[0, real[0]]).abs().max() > 0.1
