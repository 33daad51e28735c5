"""ExposeOutputs: keys and values of each layer, scores and selections become named outputs."""

import pytest
import torch

from reroute_fx.passes import ACTIONS, ExposeOutputs, InsertSelection, RouteStages, run_passes, to_program

aten = torch.ops.aten


def expose(toy, program, action=None, decisions=None):
    steps = toy.passes(4)
    if action:
        steps += [InsertSelection(tuple(decisions), tuple(decisions.values())), RouteStages(action)]
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
    graph, result = expose(toy, program, action, {1: 0.5, 2: 0.25})
    names = [f"{name}.{index}" for index in range(3) for name in ("key", "value")]
    names += [f"{name}.{index}" for index in (1, 2) for name in ("scores", "selected")]
    assert result.matched == len(names)
    assert list(graph.outputs) == names
    original, *added = graph.fx_graph.output_node().args[0]
    assert added == list(graph.outputs.values())
    assert original not in added
    inputs = toy.make_inputs(3, 40) | {"visual_index": toy.make_visual_index(3, 40, 24)}
    returned = toy.call(to_program(graph, program), inputs)
    assert list(returned) == ["output", "routing"]
    assert list(returned["routing"]) == names
    rows = [40, 16 + 12, 16 + 6]
    for index in range(3):
        for name in ("key", "value"):
            assert returned["routing"][f"{name}.{index}"].shape == (3, 2, rows[index], toy.HEAD_DIM)
    pool = 12 if action == "physical_delete" else 24
    assert returned["routing"]["scores.1"].shape == (3, 24)
    assert returned["routing"]["scores.2"].shape == (3, pool)
    assert returned["routing"]["selected.1"].shape == (3, 12)
    assert returned["routing"]["selected.2"].shape == (3, 6)
    for index in (1, 2):
        assert returned["routing"][f"scores.{index}"].dtype == torch.float32
        assert returned["routing"][f"selected.{index}"].dtype == torch.int64


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
