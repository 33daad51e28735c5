"""RestoreInPlace: a stage's rows are written into the stream itself where nothing else needs the old one."""

import pytest
import torch
from suite_tiers import one

from reroute_fx import RoutingConfig
from reroute_fx.passes import (
    ACTIONS,
    ExposeOutputs,
    InsertSelection,
    RestoreInPlace,
    RouteStages,
    run_passes,
    to_program,
)

reroute = torch.ops.reroute
aten = torch.ops.aten


def routed(toy, program, config, *more):
    steps = [*toy.passes(4), InsertSelection(config.decision_layers), RouteStages(config.action), *more]
    return run_passes(program, steps)


def program_of(toy, program, config, *more):
    graph, _ = routed(toy, program, config, *more, ExposeOutputs())
    return to_program(graph, program)


def restores(graph):
    return [
        node.target
        for node in graph.fx_graph.nodes
        if node.target in (reroute.restore_tokens.default, reroute.restore_tokens_.default)
    ]


@one("2 s each")
@pytest.mark.parametrize("action", ACTIONS)
def test_every_restore_of_a_routed_decoder_is_in_place(toy, exported, action):
    _, program = exported(layers=4, kv_heads=2)
    config = RoutingConfig((1, 2), (0.5, 0.25), action)
    before = restores(routed(toy, program, config)[0])
    graph, results = routed(toy, program, config, RestoreInPlace())
    assert set(before) == {reroute.restore_tokens.default}
    assert restores(graph) == [reroute.restore_tokens_.default] * len(before)
    result = results[-1]
    assert (result.matched, result.rewritten, result.rejected) == (len(before), len(before), ())


@one("2 s each")
@pytest.mark.parametrize("action", ACTIONS)
def test_the_program_computes_the_same_and_leaves_its_inputs_alone(toy, exported, action):
    _, program = exported(layers=4, kv_heads=2)
    config = RoutingConfig((1, 2), (0.5, 0.25), action)
    plain = program_of(toy, program, config)
    in_place = program_of(toy, program, config, RestoreInPlace())
    inputs = toy.make_prompt(config, (40, 33), ((24,), (20,)))
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    expected, result = toy.call(plain, inputs), toy.call(in_place, inputs)
    assert torch.equal(result["output"], expected["output"])
    for name, value in expected["routing"].items():
        assert torch.equal(result["routing"][name], value)
    for name, tensor in before.items():
        assert torch.equal(inputs[name], tensor)


def test_the_program_exports_again(toy, exported):
    _, program = exported(layers=4)
    config = RoutingConfig((1, 2), (0.5, 0.25))
    in_place = program_of(toy, program, config, RestoreInPlace())
    inputs = toy.make_prompt(config, (40, 33), ((24,), (20,)))
    other = toy.make_prompt(config, (57, 60, 31), ((30,), (12,), (9,)))
    toy.assert_exports_again(in_place, inputs, other)


def spoil(graph, edit):
    """Change the first restore with `edit(fx_graph, stream, restore)` and run the pass again."""
    node = graph.fx_graph.find_nodes(op="call_function", target=reroute.restore_tokens.default)[0]
    edit(graph.fx_graph, node.args[0], node)
    (_, result) = RestoreInPlace()(graph)
    assert node.target is reroute.restore_tokens.default
    assert node in graph.fx_graph.nodes
    assert [miss.node for miss in result.rejected] == [node.name]
    assert result.rewritten == result.matched - 1
    return result.rejected[0].reason


def copy_of(fx_graph, node, target, *args):
    with fx_graph.inserting_after(node):
        made = fx_graph.call_function(target, args)
    made.meta = dict(node.meta)
    return made


def test_a_stream_that_is_read_again_is_left_alone(toy, exported):
    _, program = exported(layers=4)
    graph, _ = routed(toy, program, RoutingConfig((1, 2), (0.5, 0.25)))

    def edit(fx_graph, stream, restore):
        late = copy_of(fx_graph, restore, aten.add.Tensor, stream, stream)
        reader = next(user for user in restore.users)
        reader.replace_input_with(restore, late)
        late.args = (restore, stream)

    assert "is read again by %add" in spoil(graph, edit)


def test_a_stream_that_a_view_shares_is_left_alone(toy, exported):
    _, program = exported(layers=4)
    graph, _ = routed(toy, program, RoutingConfig((1, 2), (0.5, 0.25)))

    def edit(fx_graph, stream, restore):
        view = copy_of(fx_graph, stream, aten.alias.default, stream)
        compact = next(u for u in stream.users if u.target is reroute.compact_tokens.default)
        compact.replace_input_with(stream, view)

    assert "may share memory with" in spoil(graph, edit)


def test_a_stream_that_is_a_view_itself_is_left_alone(toy, exported):
    _, program = exported(layers=4)
    graph, _ = routed(toy, program, RoutingConfig((1, 2), (0.5, 0.25)))

    def edit(fx_graph, stream, restore):
        view = copy_of(fx_graph, stream, aten.alias.default, stream)
        restore.replace_input_with(stream, view)

    assert "may share memory with what it was made from" in spoil(graph, edit)


def test_an_input_is_left_alone(toy, exported):
    _, program = exported(layers=4)
    graph, _ = routed(toy, program, RoutingConfig((1, 2), (0.5, 0.25)))

    def edit(fx_graph, stream, restore):
        restore.replace_input_with(stream, graph.inputs[0])

    assert "is an input" in spoil(graph, edit)
