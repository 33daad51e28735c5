"""Layers with recurrences in the place of an attention: found, routed, and carried from a prompt to what follows."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reroute_fx import RoutingConfig
from reroute_fx.passes import (
    ACTIONS,
    CarryStates,
    ExposeOutputs,
    InsertSelection,
    MatchError,
    RouteStages,
    run_passes,
    to_program,
)
from reroute_fx.pipeline import continuation

HEADS, TAPS = 4, 3
RECURRENT = 1
"""The layer of three that has a convolution and linear attention."""


def recur(layer, hidden, memory, cos, sin, mask):
    mixed = (layer.query(hidden) + layer.value(hidden)).transpose(1, 2)
    mixed, _ = torch.ops.reroute.causal_convolution(mixed, layer.taps, None)
    query = F.silu(mixed).transpose(1, 2).unflatten(-1, (HEADS, -1))
    key, value = (project(hidden).unflatten(-1, (HEADS, -1)) for project in (layer.key, layer.value))
    decay, beta = layer.up(hidden)[..., : 2 * HEADS].chunk(2, dim=-1)
    result, _ = torch.ops.reroute.gated_delta(query, key, value, -F.softplus(decay), beta.sigmoid())
    return layer.output(result.flatten(2))


def decoder_with(toy, mix, layers=(RECURRENT,)):
    decoder = toy.Decoder(layers=3)
    for number in layers:
        layer = decoder.layers[number]
        layer.taps = nn.Parameter(torch.randn(toy.WIDTH, TAPS))
        layer.attention = functools.partial(mix, layer)
    return decoder


@pytest.fixture(scope="module")
def recurrent(toy):
    """A decoder and its program."""
    decoder = decoder_with(toy, recur)
    return decoder, toy.export(decoder)


def exposed(toy, program, action=None):
    steps = toy.passes(4, 3)
    if action:
        steps += [InsertSelection((RECURRENT, 2)), RouteStages(action)]
    graph, results = run_passes(program, [*steps, CarryStates(), ExposeOutputs()])
    return graph, to_program(graph, program), results


def test_a_layer_around_recurrences_is_found(toy, recurrent):
    decoder, program = recurrent
    graph, edited, results = exposed(toy, program)
    assert [reach.state for reach in graph.reaches] == [False, True, False]
    assert graph.layers[RECURRENT].sizes.uncounted == (
        "reroute.causal_convolution.default",
        "reroute.gated_delta.default",
    )
    assert (results[-2].matched, results[-2].rewritten) == (2, 2)
    assert list(graph.outputs) == [f"{kind}.{i}" for i in range(3) for kind in ("key", "value")]
    inputs = toy.make_inputs(3, 40) | {"lengths": torch.tensor([40, 33, 1])}
    routing = toy.call(edited, inputs)["routing"]
    assert routing["key.1"].shape == (3, toy.WIDTH, TAPS - 1)
    assert routing["value.1"].shape == (3, HEADS, 8, 8)
    without = {name: tensor for name, tensor in inputs.items() if name != "lengths"}
    with torch.no_grad():
        expected = decoder(**without)
    output = toy.call(edited, inputs)["output"]
    for found, wanted, length in zip(output, expected, inputs["lengths"], strict=True):
        torch.testing.assert_close(found[:length], wanted[:length], atol=1e-5, rtol=0)
    toy.assert_exports_again(edited, toy.make_inputs() | {"lengths": torch.tensor([64, 9])}, inputs)


@pytest.mark.parametrize("action", [None, *ACTIONS])
def test_states_end_with_the_tokens_of_a_row(toy, recurrent, action):
    """Whatever lies behind them: states of two rows are those of each row alone."""
    _, edited, _ = exposed(toy, recurrent[1], action)
    config = RoutingConfig((RECURRENT, 2), (0.5, 0.25), action or ACTIONS[0])
    lengths, images = (40, 33), ((24,), (20,))
    inputs = toy.make_prompt(config, lengths, images)
    together = toy.call(edited, inputs)
    for row, length in enumerate(lengths):
        alone = {
            name: tensor[row : row + 1] if len(tensor) == 2 else tensor for name, tensor in inputs.items()
        }
        single = toy.call(edited, cut(alone, length, images[row][0], config))
        for name in ("key.1", "value.1"):
            found, expected = together["routing"][name][row], single["routing"][name][0]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def cut(inputs, length, visual, config):
    """A row without padding."""
    cut = dict(inputs)
    for name in ("inputs_embeds", "position_ids"):
        cut[name] = inputs[name][:, :length]
    for name in ("visual_index", *(f"keep_{layer}" for layer in config.decision_layers)):
        cut[name] = inputs[name][:, :visual]
    for number, layer in enumerate(config.decision_layers):
        kept = config.keep_count(number, visual)
        cut[f"slots_{layer}"] = torch.zeros(length - visual + kept, dtype=torch.bool)
    return cut


@pytest.mark.parametrize("parts", [(5,), (1, 1, 3)])
def test_what_follows_begins_with_the_states(toy, recurrent, parts):
    """Of two rows with prompts of 12 and 9 tokens, as if all had come at once."""
    decoder, program = recurrent
    _, prompt, _ = exposed(toy, program)
    following = continuation(program)
    lengths, new = torch.tensor([12, 9]), sum(parts)
    whole = toy.make_inputs(2, 12 + new)
    given = {name: tensor[:, :12] for name, tensor in whole.items()} | {"lengths": lengths}
    held = toy.call(prompt, given)["routing"]
    caches = {f"{kind}_cache_{i}": held[f"{kind}.{i}"] for i in range(3) for kind in ("key", "value")}
    caches = {
        name: cache if name.endswith(f"_{RECURRENT}") else F.pad(cache, (0, 0, 0, new)).contiguous()
        for name, cache in caches.items()
    }
    places = lengths[:, None] + torch.arange(new)
    rest = {name: tensor[torch.arange(2)[:, None], places] for name, tensor in whole.items()}
    found, done = [], 0
    for part in parts:
        now = {name: tensor[:, done : done + part] for name, tensor in rest.items()}
        counts = {"cached_0": lengths + done, "new_tokens": torch.full((2,), part)}
        result = toy.call(following, {**now, **caches, **counts})
        found.append(result["output"])
        caches |= {
            f"{kind}_cache_{RECURRENT}": result["routing"][f"{kind}.{RECURRENT}"] for kind in ("key", "value")
        }
        done += part
    for row, length in enumerate(lengths.tolist()):
        with torch.no_grad():
            expected = decoder(
                **{name: tensor[row : row + 1, : length + new] for name, tensor in whole.items()}
            )
        torch.testing.assert_close(torch.cat(found, dim=1)[row], expected[0, length:], atol=1e-5, rtol=0)


def over_channels(layer, hidden, memory, cos, sin, mask):
    """A convolution along the channels of each token, with the tokens in the place of channels."""
    mixed, _ = torch.ops.reroute.causal_convolution(hidden, layer.taps, None)
    return layer.output(mixed)


def test_other_recurrences_are_refused(toy):
    with pytest.raises(MatchError, match=r"causal_convolution.*has no tokens in dimension 2"):
        run_passes(toy.export(decoder_with(toy, over_channels)), toy.passes(4))
    with pytest.raises(MatchError, match="No attention was found"):
        run_passes(toy.export(decoder_with(toy, recur, layers=(0, 1, 2))), toy.passes(4))


def test_a_decoder_without_recurrences_stays_as_it_is(toy, exported):
    _, program = exported(layers=2)
    graph, results = run_passes(program, [*toy.passes(4), CarryStates()])
    assert results[-1].matched == 0
    assert "lengths" not in [node.name for node in graph.inputs]
