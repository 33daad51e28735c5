"""RemoveNoOps: calls that return their input go away, calls that change it stay."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reroute_fx.passes import RemoveNoOps, run_passes, to_program

aten = torch.ops.aten


class Identities(nn.Module):
    """Each line calls something that returns its input."""

    def forward(self, inputs):
        batch, length, width = inputs.shape
        hidden = inputs.sin()
        hidden = hidden.to(torch.float32)
        hidden = hidden[:, :, :]
        hidden = hidden[0:]
        hidden = hidden.expand(batch, length, width)
        hidden = hidden.detach()
        hidden = F.dropout(hidden, 0.5, training=False)
        hidden = hidden + 0
        return hidden.cos()


class Changes(nn.Module):
    """Each line calls the same operators, but changes its input."""

    def forward(self, inputs):
        batch, length, width = inputs.shape
        hidden = inputs.to(torch.float64)
        hidden = hidden[..., 1:]
        hidden = hidden[..., ::2]
        hidden = hidden[..., :1].expand(batch, length, width)
        hidden = hidden + 1
        hidden = hidden + 0.5
        return hidden.to(torch.float32)


class Widened(nn.Module):
    """Adding 0 to integers in floating point changes the dtype."""

    def forward(self, inputs):
        return inputs.to(torch.int64) + 0.0


class Dropout(nn.Module):
    def forward(self, inputs):
        return F.dropout(inputs.sin(), 0.5, training=True)


@pytest.fixture
def run(toy):
    def run_on(module):
        inputs = {"inputs": torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0))}
        program = toy.export(module, inputs)
        graph, (result,) = run_passes(program, [RemoveNoOps()])
        return program, graph, result, inputs

    return run_on


def calls(graph):
    return [
        n.target for n in graph.nodes if n.op == "call_function" and isinstance(n.meta["val"], torch.Tensor)
    ]


def test_identities_are_removed(run, toy):
    program, graph, result, inputs = run(Identities())
    before = calls(program.graph)
    for operator in (aten.to, aten.slice, aten.expand, aten.detach, aten.dropout, aten.add):
        assert toy.operators(program.graph, operator), f"{operator} is not in the exported graph"
    assert calls(graph.fx_graph) == [aten.sin.default, aten.cos.default]
    assert result.name == "RemoveNoOps"
    assertions = len(toy.operators(program.graph, aten._assert_tensor_metadata))
    assert assertions == 1
    assert result.matched == result.rewritten == len(before) - 2 + assertions
    edited = toy.call(to_program(graph, program), inputs)["output"]
    assert torch.equal(edited, inputs["inputs"].sin().cos())


def test_calls_that_change_something_stay(run, toy):
    program, graph, result, inputs = run(Changes())
    changing = [aten.to, aten.slice, aten.slice, aten.slice, aten.expand, aten.add, aten.add, aten.to]
    left = [target.overloadpacket for target in calls(graph.fx_graph)]
    assert left == changing
    assertions = len(toy.operators(program.graph, aten._assert_tensor_metadata))
    assert toy.operators(graph.fx_graph, aten._assert_tensor_metadata) == []
    assert result.matched == result.rewritten == assertions
    edited = toy.call(to_program(graph, program), inputs)["output"]
    assert torch.equal(edited, Changes()(**inputs))


def test_adding_zero_stays_where_it_changes_the_dtype(run, toy):
    program, graph, _, inputs = run(Widened())
    assert len(toy.operators(graph.fx_graph, aten.add)) == 1
    assert toy.call(to_program(graph, program), inputs)["output"].dtype == torch.float32


def test_active_dropout_stays(run, toy):
    _, graph, result, _ = run(Dropout())
    assert len(toy.operators(graph.fx_graph, aten.dropout)) == 1
    assert result.matched == result.rewritten == 0


def test_decoder_computes_the_same(exported, toy):
    model, program = exported(padding=True, kv_heads=2)
    graph, (result,) = run_passes(program, [RemoveNoOps()])
    removed = len(program.graph.nodes) - len(graph.fx_graph.nodes)
    assert result.matched == result.rewritten > 0
    assert removed >= result.matched
    full = [n for n in toy.operators(graph.fx_graph, aten.slice) if n.args[2:] == (0, 2**63 - 1)]
    assert full == []
    edited = to_program(graph, program)
    inputs = toy.make_inputs(3, 40, padding=True)
    toy.assert_agrees(edited, model, inputs)
    assert torch.equal(toy.call(edited, inputs)["output"], toy.call(program, inputs))


def test_result_exports_again(exported, toy):
    _, program = exported(padding=True, kv_heads=2)
    graph, _ = run_passes(program, [RemoveNoOps()])
    inputs, other = toy.make_inputs(padding=True), toy.make_inputs(3, 40, padding=True)
    toy.assert_exports_again(to_program(graph, program), inputs, other)


def test_second_run_finds_nothing(exported):
    _, program = exported(padding=True, kv_heads=2)
    _, (first, second) = run_passes(program, [RemoveNoOps(), RemoveNoOps()])
    assert first.rewritten > 0
    assert second.matched == second.rewritten == 0
