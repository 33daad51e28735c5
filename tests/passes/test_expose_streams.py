"""ExposeStreams: the residual stream before each layer becomes an output, with all rows."""

import pytest
import torch
from suite_tiers import one

from reroute_fx import RoutingConfig
from reroute_fx.passes import (
    ACTIONS,
    AttendToCache,
    ExposeStreams,
    InsertSelection,
    RestoreInPlace,
    RouteStages,
    run_passes,
    to_program,
)

LAYERS = 4


def expose(toy, program, config, *more):
    steps = [InsertSelection(config.decision_layers), RouteStages(config.action, keep_streams=True), *more]
    graph, results = run_passes(program, [*toy.passes(LAYERS), *steps, ExposeStreams()])
    return graph, results


def layer_inputs(model, inputs):
    seen = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for layer in model.layers
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


def test_streams_of_an_unrouted_decoder(toy, exported):
    model, program = exported(layers=LAYERS, kv_heads=2)
    graph, results = run_passes(program, [*toy.passes(LAYERS), ExposeStreams()])
    assert (results[-1].matched, results[-1].rewritten) == (LAYERS, 1)
    inputs = toy.make_inputs(3, 40)
    routing = toy.call(to_program(graph, program), inputs)["routing"]
    assert list(routing) == [f"stream.{i}" for i in range(LAYERS)]
    for found, expected in zip(routing.values(), layer_inputs(model, inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@one("1 s each")
@pytest.mark.parametrize("action", ACTIONS)
def test_with_all_tokens_streams_are_those_of_the_decoder(toy, exported, action):
    model, program = exported(layers=LAYERS, kv_heads=2)
    config = RoutingConfig((1, 2), (1.0, 1.0), action)
    graph, _ = expose(toy, program, config)
    inputs = toy.make_prompt(config, (40, 40), ((24,), (20,)))
    routing = toy.call(to_program(graph, program), inputs)["routing"]
    plain = {name: inputs[name] for name in ("inputs_embeds", "position_ids")}
    for found, expected in zip(routing.values(), layer_inputs(model, plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@one("2 s each")
@pytest.mark.parametrize("action", ACTIONS)
def test_kept_streams_are_not_written_into(toy, exported, action):
    _, program = exported(layers=LAYERS, kv_heads=2)
    config = RoutingConfig((1, 3), (0.5, 0.25), action)
    inputs = toy.make_prompt(config, (40, 33), ((24,), (20,)))
    plain, _ = expose(toy, program, config)
    saving, results = expose(toy, program, config, RestoreInPlace())
    assert any(miss.reason.endswith("is kept") for miss in results[-2].rejected)
    wanted, found = (toy.call(to_program(graph, program), inputs) for graph in (plain, saving))
    for name, stream in wanted["routing"].items():
        assert torch.equal(found["routing"][name], stream)


def test_streams_of_tokens_on_a_cache(toy, exported):
    _, program = exported(layers=LAYERS, kv_heads=2)
    graph, results = run_passes(program, [*toy.passes(LAYERS), AttendToCache((2,)), ExposeStreams()])
    assert results[-1].matched == LAYERS
    assert list(graph.outputs) == [f"stream.{i}" for i in range(LAYERS)]


def test_result_exports_again(toy, exported):
    _, program = exported(layers=LAYERS, kv_heads=2)
    graph, _ = run_passes(program, [*toy.passes(LAYERS), ExposeStreams()])
    toy.assert_exports_again(to_program(graph, program), toy.make_inputs(), toy.make_inputs(3, 40))
