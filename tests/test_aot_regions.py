"""Programs as schedules over regions that are compiled ahead of time; `test_artifact.py` shows what they compute."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conversations import ROUTING, unrouted_model
from suite_tiers import one

from reroute_fx.capture import capture_decoder
from reroute_fx.errors import BackendUnavailableError, CaptureError
from reroute_fx.lowering import ScheduledProgram
from reroute_fx.lowering.example_sizes import ExampleSizes
from reroute_fx.lowering.inductor import aot_regions
from reroute_fx.lowering.inductor.aot_regions import package_region, schedule
from reroute_fx.pipeline import continuation, route

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["llava", "qwen"])
def scheduled(request):
    model, config = unrouted_model(request.param), ROUTING[request.param]
    program = capture_decoder(model).program
    programs = {
        "prefill": route(program, config)[0],
        "continuation": continuation(program, config.decision_layers),
    }
    parts = {name: schedule(program) for name, program in programs.items()}
    return SimpleNamespace(parts=parts, programs=programs)


@pytest.fixture
def region(scheduled):
    return copy.deepcopy(scheduled.parts["prefill"].regions[0])


@one("2 s each")
def test_regions_are_few_and_called_for_every_layer(scheduled):
    calls = {name: len(parts.schedule.calls) for name, parts in scheduled.parts.items()}
    regions = {name: len(parts.regions) for name, parts in scheduled.parts.items()}
    assert calls["prefill"] > regions["prefill"]
    for parts in scheduled.parts.values():
        called = len(parts.regions) + len(parts.schedule.others)
        assert {call.region for call in parts.schedule.calls} == set(range(called))
        assert all(len(others["calls"]) <= 10 for others in parts.schedule.others)


def test_values_are_released_after_their_last_use(scheduled):
    parts, source = scheduled.parts["prefill"], scheduled.programs["prefill"]
    weights = {**source.state_dict, **source.constants}
    program = ScheduledProgram(parts.schedule, [pytest.fail] * len(parts.regions), weights)
    released = [value for values in program.released for value in values]
    assert len(released) == len(set(released))
    assert not set(released) & set(program.schedule.outputs.values())


def test_a_region_that_is_fixed_to_a_size_is_refused(region):
    node = next(iter(region.graph.find_nodes(op="placeholder")))
    fake = node.meta["val"]
    (example,) = aot_regions._examples([fake], [fake.shape], CPU)
    with region.graph.inserting_before(region.graph.output_node()):
        fixed = region.graph.call_function(torch.ops.aten.zeros.default, (list(example.shape),))
        region.graph.call_function(torch.ops.aten.add.Tensor, (node, fixed))
    region.recompile()
    with pytest.raises(CaptureError, match="fixed to"):
        package_region(region, CPU)


def test_equal_regions_are_compiled_once(scheduled, region, monkeypatch):
    """Of the same and of another model, as long as graph, sizes and kinds of inputs are the same."""
    compiled = []
    monkeypatch.setattr(aot_regions, "_packages", {})
    monkeypatch.setattr(aot_regions, "_compile", lambda given, device: compiled.append(given) or b"code")
    original = scheduled.parts["prefill"].regions[0]
    assert package_region(original, CPU) == package_region(region, CPU) == b"code"
    assert len(compiled) == 1
    assert compiled[0] is not original  # compiling changes the graph
    for other in scheduled.parts["prefill"].regions[1:]:
        package_region(other, CPU)
    assert len(compiled) == len(scheduled.parts["prefill"].regions)
    node = next(n for n in region.graph.nodes if n.op == "call_function")
    node.meta["region"] = "layer.99"
    package_region(region, CPU)
    assert len(compiled) == len(scheduled.parts["prefill"].regions)
    first = next(iter(region.graph.find_nodes(op="placeholder")))
    first.meta["val"] = first.meta["val"].double()
    package_region(region, CPU)
    assert len(compiled) == len(scheduled.parts["prefill"].regions) + 1


def test_sizes_of_examples_are_as_captured_and_never_equal(scheduled):
    """A compiler decides by them what is worth several threads: tiny ones would make slow code."""
    for name, parts in scheduled.parts.items():
        for region in parts.regions:
            fakes = [n.meta["val"] for n in region.graph.find_nodes(op="placeholder")]
            shapes = [f.shape if isinstance(f, torch.Tensor) else (f,) for f in fakes]
            sizes = {}
            for example, shape in zip(aot_regions._examples(fakes, shapes, CPU), shapes, strict=True):
                for size, symbol in zip(example.shape, shape, strict=True):
                    if isinstance(symbol, torch.SymInt):
                        assert sizes.setdefault(str(symbol), size) == size
                        assert size >= symbol.node.hint
            assert len(set(sizes.values())) == len(sizes), name


@pytest.mark.parametrize("first", ["edges", "product"])
def test_patches_of_an_example_are_its_rows_times_its_columns(first):
    """Otherwise a region that lays patches out in rows and columns again can't be traced."""

    class Flat(torch.nn.Module):
        def forward(self, cells):
            return cells.flatten(0, 1) + 1

    edges = {0: 2 * torch.export.Dim("rows"), 1: 2 * torch.export.Dim("columns")}
    program = torch.export.export(Flat(), (torch.zeros(6, 8, 3),), dynamic_shapes=(edges,))
    cells, patches = (
        next(n.meta["val"] for n in program.graph.nodes if n.name == name) for name in ("cells", "add")
    )
    size, order = ExampleSizes(), [*cells.shape[:2], patches.shape[0]]
    found = {str(each): size(each) for each in (order if first == "edges" else order[::-1])}
    height, width, product = (found[str(each)] for each in order)
    assert height % 2 == width % 2 == 0
    assert height != width
    assert product == height * width


def test_a_missing_compiler_is_named(region):
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(BackendUnavailableError, match=r"No C\+\+ compiler.*apt install g\+\+"),
    ):
        package_region(region, CPU)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 0, 2, 1)])
def test_examples_lie_in_memory_as_what_they_stand_for(order):
    """A program reads memory as it was laid out when it was compiled."""
    given = torch.empty(2, 3, 5, 7).permute(order)
    (example,) = aot_regions._examples([given], [given.shape], CPU)
    assert (example.shape, example.stride()) == (given.shape, given.stride())


@pytest.mark.parametrize(
    "view", [lambda t: t[:, :3], lambda t: t[:, :1].expand(-1, 5, -1)], ids=["gaps", "overlap"]
)
def test_tensors_that_would_be_misread_are_refused(view):
    given = view(torch.empty(2, 5, 7))
    with pytest.raises(CaptureError, match="expected one without gaps"):
        aot_regions._examples([given], [given.shape], CPU)
