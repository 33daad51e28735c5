"""Regions that are compiled once for any numbers of rows, and again for what the compiler took for granted."""

import pytest
import torch
from torch import fx
from torch.export import Dim

from reroute_fx.lowering.inductor import compiled_regions
from reroute_fx.lowering.inductor.compiled_regions import _CompiledRegion

CPU = torch.device("cpu")
MANY = 100


def shifted(x, y):
    """Takes one way with few rows and another with many, as kernels do that sort."""
    return x + y[:, :1] if x.shape[0] < MANY else x - y[:, :1]


def inputs_of_a_graph(graph, *dims):
    """Placeholders for a tensor ``[rows, 3]`` and one ``[rows, 2]`` for each of `dims`, as a program has them."""

    class Sum(torch.nn.Module):
        def forward(self, *pairs):
            return sum(x.sum() for x in pairs)

    example = [torch.ones(7 + i, width) for i in range(len(dims)) for width in (3, 2)]
    shapes = tuple({0: dim} for dim in dims for _ in range(2))
    program = torch.export.export(Sum(), tuple(example), dynamic_shapes=(shapes,))
    inputs = []
    for node in program.graph.find_nodes(op="placeholder"):
        inputs.append(graph.placeholder(node.name))
        inputs[-1].meta["val"] = node.meta["val"]
    return inputs


def region():
    """`shifted` on tensors of the same number of rows."""
    graph = fx.Graph()
    inputs = inputs_of_a_graph(graph, Dim("rows"))
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


@pytest.mark.usefixtures("fresh_regions")
def test_sizes_are_checked_once_for_calls_of_equal_sizes():
    """Five layers, three on some rows and two on others, are one region, of which each stage chooses what runs."""
    graph = fx.Graph()
    first, y, second, z = inputs_of_a_graph(graph, Dim("rows"), Dim("others"))
    streams = {first: first, second: second}
    for index, (start, added) in enumerate([(first, y)] * 3 + [(second, z)] * 2):
        for function, more in ((shifted, (added,)), (torch.ops.aten.sin.default, ())):
            streams[start] = graph.call_function(function, (streams[start], *more))
            streams[start].meta = {"val": start.meta["val"], "region": f"layer.{index}"}
    graph.output(tuple(streams.values()))
    regions, _ = compiled_regions.lower(fx.GraphModule({}, graph), CPU, dynamic=True)
    assert (regions.calls, len(regions.compiled)) == (5, 1)
    called = [getattr(node.target, "__name__", node.target) for node in regions.module.graph.nodes]
    assert [called.count(name) for name in ("choose", "__call__")] == [2, 5]
    (compiled,) = compiled_regions._regions.values()
    for rows, others, variants in ((5, 8, 1), (5, 200, 2), (300, 6, 2), (1, 99, 2)):
        tensors = [torch.randn(size, width) for size in (rows, others) for width in (3, 2)]
        found = regions.module(*tensors)
        for result, stream, added, count in zip(found, tensors[::2], tensors[1::2], (3, 2), strict=True):
            for _ in range(count):
                stream = shifted(stream, added).sin()
            torch.testing.assert_close(result, stream)
        assert len(compiled.compiled) == variants
