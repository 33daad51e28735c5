"""Small graphs as data: they compute the same after a way through JSON, and what is damaged is refused."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from suite_tiers import examples
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from reroute_fx.errors import ArtifactError
from reroute_fx.lowering.operator_list import from_operator_list, to_operator_list


def compute(x, weight):
    rows = torch.nn.functional.rms_norm(x.to(torch.float64), x.shape[-1:])
    largest, _ = (rows.float() @ weight).max(dim=-1)
    return torch.cat([largest.masked_fill(largest < 0, -torch.inf), x.mean(dim=[1])], dim=-1).contiguous()


@pytest.fixture(scope="module")
def traced():
    return make_fx(compute, tracing_mode="symbolic")(torch.randn(2, 3), torch.randn(3, 3)).graph


@pytest.fixture(scope="module")
def written(traced):
    graph = copy.deepcopy(traced)
    result = graph.output_node()
    result.args = ((result.args[0],),)
    return json.loads(json.dumps(to_operator_list(graph)))


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_same_after_a_way_through_json(written, rows):
    x, weight = torch.randn(rows, 3), torch.randn(3, 3)
    (found,) = from_operator_list(written)([x, weight])
    assert torch.equal(found, compute(x, weight))


def test_an_operator_that_writes_does_so():
    graph = fx.Graph()
    rows = graph.placeholder("rows")
    graph.output((graph.call_function(torch.ops.aten.mul_.Scalar, (rows, 2)),))
    given_rows = torch.ones(3)
    from_operator_list(json.loads(json.dumps(to_operator_list(graph))))([given_rows])
    assert given_rows.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("target", "arguments"),
    [
        (torch.ops.aten.arange.default, {"device": torch.device("cpu")}),
        (torch.ops.aten.arange.default, {"layout": torch.strided}),
        (torch.ops.prims.iota.default, {}),
        (torch.add, {}),
    ],
    ids=["device", "layout", "library", "function"],
)
def test_what_cannot_be_written_down_is_left_to_the_compiler(target, arguments):
    graph = fx.Graph()
    graph.output((graph.call_function(target, (3,), arguments),))
    assert to_operator_list(graph) is None


def places(data, path=()):
    """Paths of everything inside JSON."""
    if path:
        yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


@examples(gate=60, full=500, reason="damage to any part", derandomize=True)
@given(data=st.data())
def test_damage_is_refused_or_reads_only_what_is_there(written, data):
    damaged = copy.deepcopy(written)
    *path, last = data.draw(st.sampled_from(sorted(places(written), key=str)))
    parent = damaged
    for key in path:
        parent = parent[key]
    parent[last] = data.draw(st.sampled_from([None, -1, 10**9, 1.5, True, "x", "os.system.x", [], {}, [[]]]))
    try:
        run = from_operator_list(damaged)
    except ArtifactError:
        return
    assert callable(run)


@pytest.mark.parametrize(
    "data", [None, [], {}, {"takes": 0, "calls": [], "returns": [{"value": 0}]}], ids=str
)
def test_other_data_is_refused(data):
    with pytest.raises(ArtifactError, match="damaged"):
        from_operator_list(data)
