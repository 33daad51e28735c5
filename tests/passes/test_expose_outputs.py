"""ExposeOutputs: keys and values of each layer, scores and selections become named outputs."""

import pytest
import torch

from reroute_fx import RoutingConfig
from reroute_fx.passes import ACTIONS, ExposeOutputs, InsertSelection, RouteStages, run_passes, to_program

aten = torch.ops.aten


def expose(toy, program, config=None):
    steps = toy.passes(4)
    if config:
        steps += [InsertSelection(config.decision_layers), RouteStages(config.action)]
    graph, results = run_passes(program, [*steps, ExposeOutputs()])
    return graph, results[-1]


def keys_and_values(toy, model, inputs):
    """What attention sees of each layer in the eager module, before heads are repeated."""
    rotated = []

    def attend(query, key, value, mask):
        group = query.shape[1] // model.layers[0].kv_heads
        rotated.append((key[:, ::group], value[:, ::group]))
        return toy.sdpa(query, key, value, mask)

    for layer in model.layers:
        layer.attend = attend
    with torch.no_grad():
        model(**inputs)
    return rotated


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_keys_and_values_of_an_unrouted_decoder(toy, exported, kv_heads):
    model, program = exported(layers=3, kv_heads=kv_heads)
    graph, result = expose(toy, program)
    assert (result.matched, result.rewritten) == (6, 1)
    assert list(graph.outputs) == ["key.0", "value.0", "key.1", "value.1", "key.2", "value.2"]
    edited = to_program(graph, program)
    inputs = toy.make_inputs(3, 40)
    toy.assert_agrees(edited, model, inputs)
    routing = toy.call(edited, inputs)["routing"]
    exact = keys_and_values(toy, toy.double(model), toy.in_double(inputs))
    for index, pair in enumerate(exact):
        for name, expected in zip(("key", "value"), pair, strict=True):
            exposed = routing[f"{name}.{index}"]
            assert exposed.shape == expected.shape == (3, kv_heads, 40, toy.HEAD_DIM)
            torch.testing.assert_close(exposed.double(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("action", ACTIONS)
def test_outputs_of_a_routed_decoder(toy, exported, action):
    _, program = exported(layers=3, kv_heads=2)
    config = RoutingConfig((1, 2), (0.5, 0.25), action)
    graph, result = expose(toy, program, config)
    names = [f"{name}.{index}" for index in range(3) for name in ("key", "value")]
    names += [f"{name}.{index}" for index in (1, 2) for name in ("scores", "kept")]
    assert result.matched == len(names)
    assert list(graph.outputs) == names
    original, *added = graph.fx_graph.output_node().args[0]
    assert added == list(graph.outputs.values())
    assert original not in added
    inputs = toy.make_prompt(config, (40, 33), ((24,), (20,)))
    returned = toy.call(to_program(graph, program), inputs)
    assert list(returned) == ["output", "routing"]
    routing = returned["routing"]
    assert list(routing) == names
    rows = [40, max(16 + 12, 13 + 10), max(16 + 6, 13 + 5)]
    for index in range(3):
        for name in ("key", "value"):
            assert routing[f"{name}.{index}"].shape == (2, 2, rows[index], toy.HEAD_DIM)
    candidates = {1: [24, 20], 2: [12, 10] if action == "physical_delete" else [24, 20]}
    for index, kept in ((1, [12, 10]), (2, [6, 5])):
        assert routing[f"scores.{index}"].dtype == torch.float32
        assert routing[f"kept.{index}"].dtype == torch.bool
        assert routing[f"scores.{index}"].shape == routing[f"kept.{index}"].shape == (2, 24)
        assert routing[f"kept.{index}"].sum(1).tolist() == kept
        assert routing[f"scores.{index}"].isfinite().sum(1).tolist() == candidates[index]


def test_only_the_output_node_changes(toy, exported):
    _, program = exported(layers=3, kv_heads=2)
    before, _ = run_passes(program, toy.passes(4))
    graph, _ = expose(toy, program)
    assert [n.name for n in graph.fx_graph.nodes] == [n.name for n in before.fx_graph.nodes]
    assert len(before.fx_graph.output_node().args[0]) == 1
    assert len(graph.fx_graph.output_node().args[0]) == 7


class ReturnsMore(torch.nn.Module):
    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, inputs_embeds, position_ids):
        hidden = self.decoder(inputs_embeds, position_ids)
        return {"last": [hidden, hidden * 2], "nothing": None}


def test_structure_of_the_original_output_is_kept(toy):
    model = ReturnsMore(toy.Decoder())
    program = toy.export(model)
    graph, _ = expose(toy, program)
    inputs = toy.make_inputs(3, 40)
    output = toy.call(to_program(graph, program), inputs)["output"]
    assert list(output) == ["last", "nothing"]
    assert output["nothing"] is None
    with torch.no_grad():
        expected = model(**inputs)["last"]
    assert torch.equal(output["last"][1], output["last"][0] * 2)
    torch.testing.assert_close(output["last"][0], expected[0], rtol=1e-5, atol=1e-5)


def test_result_exports_again(toy, exported):
    _, program = exported(kv_heads=2)
    graph, _ = expose(toy, program)
    toy.assert_exports_again(to_program(graph, program), toy.make_inputs(), toy.make_inputs(3, 40))
