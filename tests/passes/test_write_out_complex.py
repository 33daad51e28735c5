"""WriteOutComplex: turns in the complex plane in real numbers, and what is left alone."""

import pytest
import torch
from torch import nn

from reroute_fx.passes import WriteOutComplex, run_passes, to_program

aten = torch.ops.aten


class Turns(nn.Module):
    """Pairs of numbers turn by an angle for each token, of which one dimension is added and a length changed."""

    def forward(self, inputs):
        angles = inputs[..., 0:1] * torch.tensor([1.0, 0.1, 0.01, 0.001])
        turns = torch.polar(torch.full_like(angles, 0.5), angles)
        turns = (turns * 2.0).unsqueeze(1).expand(-1, 2, -1, -1)
        pairs = inputs.reshape(*inputs.shape[:-1], -1, 2)
        turned = torch.view_as_complex(pairs)[:, None] * turns * angles[:, None].cos()
        return torch.view_as_real(turned).flatten(3)


class Magnitude(nn.Module):
    def forward(self, inputs):
        return torch.view_as_complex(inputs.reshape(*inputs.shape[:-1], -1, 2)).abs()


class Conjugate(nn.Module):
    def forward(self, inputs):
        pairs = torch.view_as_complex(inputs.reshape(*inputs.shape[:-1], -1, 2))
        return torch.view_as_real(pairs.reciprocal())


class ByAComplexNumber(nn.Module):
    def forward(self, inputs):
        return torch.view_as_real(torch.view_as_complex(inputs.reshape(*inputs.shape[:-1], -1, 2)) * 1j)


@pytest.fixture
def run(toy):
    def run_on(module):
        inputs = {"inputs": torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0))}
        program = toy.export(module, inputs)
        graph, (result,) = run_passes(program, [WriteOutComplex()])
        return program, graph, result, inputs

    return run_on


def complex_nodes(graph):
    return sum(node.meta["val"].is_complex() for node in tensors(graph))


def tensor_calls(graph):
    return [node.target for node in tensors(graph) if node.op == "call_function"]


def tensors(graph):
    return [node for node in graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]


def test_turns_are_written_out_in_real_numbers(run, toy):
    program, graph, result, inputs = run(Turns())
    assert result.matched == result.rewritten == complex_nodes(program.graph) > 5
    assert (complex_nodes(graph.fx_graph), result.rejected) == (0, ())
    found = toy.call(to_program(graph, program), inputs)["output"]
    torch.testing.assert_close(found, Turns()(**inputs), atol=1e-6, rtol=1e-6)


def test_result_exports_again(run, toy):
    program, graph, _, inputs = run(Turns())
    other = {"inputs": torch.randn(3, 40, 8, generator=torch.Generator().manual_seed(1))}
    toy.assert_exports_again(to_program(graph, program), inputs, other)


@pytest.mark.parametrize(
    ("module", "operator"), [(Magnitude, "abs"), (Conjugate, "reciprocal"), (ByAComplexNumber, "mul")]
)
def test_graphs_with_another_operator_on_complex_numbers_are_left_alone(run, module, operator):
    program, graph, result, _ = run(module())
    assert (result.matched, result.rewritten) == (complex_nodes(program.graph), 0)
    assert result.rejected[0].reason.startswith(f"aten.{operator}")
    assert complex_nodes(graph.fx_graph) == complex_nodes(program.graph)


def test_a_decoder_without_complex_numbers_stays_as_it_is(exported):
    _, program = exported(padding=True, kv_heads=2)
    graph, (result,) = run_passes(program, [WriteOutComplex()])
    assert (result.matched, result.rewritten, result.rejected) == (0, 0, ())
    assert tensor_calls(graph.fx_graph) == tensor_calls(program.graph)
