"""Regions that are compiled once for any numbers of rows, and again for what the compiler took for granted."""

import pytest
import torch
from torch import fx
from torch.export import Dim

from reroute_fx.lowering.inductor.compiled_regions import _CompiledRegion

CPU = torch.device("cpu")
MANY = 100


def shifted(x, y):
    """Takes one way with few rows and another with many, as kernels do that sort."""
    return x + y[:, :1] if x.shape[0] < MANY else x - y[:, :1]


def region():
    """`shifted` on tensors of the same number of rows, as a program was exported with."""

    class Add(torch.nn.Module):
        def forward(self, x, y):
            return x + y[:, :1]

    rows = Dim("rows")
    example = (torch.ones(7, 3), torch.ones(7, 2))
    program = torch.export.export(Add(), example, dynamic_shapes=({0: rows}, {0: rows}))
    graph = fx.Graph()
    inputs = []
    for node in program.graph.find_nodes(op="placeholder"):
        inputs.append(graph.placeholder(node.name))
        inputs[-1].meta["val"] = node.meta["val"]
    graph.output((graph.call_function(shifted, tuple(inputs)),))
    return fx.GraphModule({}, graph)


def expect(compiled, rows):
    x, y = torch.randn(rows, 3), torch.randn(rows, 2)
    (found,) = compiled(x, y)
    torch.testing.assert_close(found, shifted(x, y), atol=0, rtol=0)


@pytest.mark.parametrize("first", [1, 6])
def test_any_number_of_rows_of_which_the_same_holds(first):
    compiled = _CompiledRegion(region(), CPU, dynamic=True)
    for rows in (first, 1, 2, 99):
        expect(compiled, rows)
    assert len(compiled.compiled) == 1
    for rows in (100, 3000, 5):
        expect(compiled, rows)
    assert len(compiled.compiled) == 2


def test_what_comes_from_the_cache_remembers_what_was_taken_for_granted():
    for _ in range(2):
        compiled = _CompiledRegion(region(), CPU, dynamic=True)
        expect(compiled, 8)
        expect(compiled, 200)
        assert len(compiled.compiled) == 2


def test_fixed_sizes_are_those_of_a_call():
    compiled = _CompiledRegion(region(), CPU, dynamic=False)
    for rows in (4, 5, 4):
        expect(compiled, rows)
    assert len(compiled.compiled) == 2
