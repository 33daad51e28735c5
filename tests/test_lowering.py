"""Regions: equal layers share one function, and splitting changes nothing."""

import operator

import pytest
import torch
from golden_models import Golden, decoder_inputs
from suite_tiers import one
from torch.export import Dim

from reroute_fx import ConfigError, RoutingConfig
from reroute_fx.capture import capture_decoder
from reroute_fx.lowering import lower
from reroute_fx.lowering.regions import share_regions
from reroute_fx.pipeline import route, unrouted


@pytest.fixture(scope="module", params=["llava", "qwen"])
def captured(request):
    golden: Golden = request.getfixturevalue(request.param)
    return capture_decoder(golden.model)


def flatten(result):
    return [result["output"].last_hidden_state, *result["routing"].values()]


@one("2 s each")
@pytest.mark.parametrize(
    ("action", "most"),
    [("compact_route_stagewise", 3), ("compact_route", 4), ("physical_delete", 6)],
)
def test_regions_are_few_and_compute_the_same(captured, action, most):
    config = RoutingConfig((3, 10, 17), (0.5, 0.3, 0.1), action)
    program, _ = route(captured.program, config)
    regions = share_regions(program.graph_module, lambda region: region.forward)
    assert regions.calls > captured.num_layers
    assert len(regions.compiled) <= most
    whole, split = lower(program, "eager"), lower(program, "eager")
    split._module = regions.module
    inputs = decoder_inputs(captured, config, batch=2)
    for a, b in zip(flatten(whole(**inputs)), flatten(split(**inputs)), strict=True):
        assert torch.equal(a, b)


def test_all_layers_of_an_unrouted_decoder_are_one_region(captured):
    program = unrouted(captured.program, captured.num_layers)
    seen = []
    regions = share_regions(program.graph_module, lambda region: seen.append(region) or region.forward)
    layers = [r for r in seen if any("scaled_dot" in str(n.target) for n in r.graph.nodes)]
    assert len(layers) == 1
    assert len(seen) + len(regions.others) == 3  # rotary positions, layer, final norm
    assert regions.calls - len(seen) == captured.num_layers - 1


def test_layers_that_differ_do_not_share(captured):
    program = unrouted(captured.program, captured.num_layers)
    module = program.graph_module
    before = len(share_regions(module, lambda region: region.forward).compiled)
    norm = next(
        n
        for n in module.graph.nodes
        if n.target is torch.ops.aten.add.Tensor
        and n.meta.get("region") == "layer.4"
        and isinstance(n.args[1], float)
    )
    norm.args = (norm.args[0], 0.5)
    assert len(share_regions(module, lambda region: region.forward).compiled) == before + 1


def test_sizes_inside_a_region_come_from_its_tensors(captured):
    program, _ = route(captured.program, RoutingConfig((3, 10), (0.5, 0.3)))
    regions = share_regions(program.graph_module, lambda region: region.forward)
    calls = [n for n in regions.module.graph.nodes if "region" in getattr(n.target, "__name__", "")]
    assert len(calls) > regions.calls
    for call in calls:
        integers = [a for a in call.args if not isinstance(a.meta.get("val"), torch.Tensor | None)]
        counts = [a for a in integers if a.target is not operator.getitem]
        assert len(counts) <= 1  # the places of a stage


@pytest.mark.full("26 s; smaller programs of fixed size are compiled in the gate")
def test_static_compilation(llava):
    captured = capture_decoder(llava.model)
    config = RoutingConfig((3,), (0.5,))
    program, _ = route(captured.program, config)
    inputs = decoder_inputs(captured, config)
    static, eager = lower(program, dynamic=False), lower(program, "eager")
    for a, b in zip(flatten(static(**inputs)), flatten(eager(**inputs)), strict=True):
        # Fused float32 kernels round in another order: 3e-5 on values near 4.
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


class AddTwelve(torch.nn.Module):
    """Has more operators than what is not compiled."""

    def forward(self, x):
        for _ in range(12):
            x = x + 1
        return {"output": x}


def test_a_call_outside_the_compiled_range_says_what_it_cost(caplog):
    program = torch.export.export(AddTwelve(), (), {"x": torch.ones(4)}, dynamic_shapes={"x": {0: Dim("n")}})
    executable = lower(program, dynamic=False, name="adding")
    caplog.set_level("INFO", "reroute_fx.lowering")
    for size in (4, 4, 5, 5):
        assert torch.equal(executable(x=torch.ones(size))["output"], torch.full((size,), 13.0))
    first, again = (record for record in caplog.records if record.name.startswith("reroute_fx"))
    assert (first.levelname, again.levelname) == ("INFO", "WARNING")
    assert again.getMessage().startswith(
        "adding: a call outside what was compiled so far; compiled 1 regions in "
    )
    assert "'x': [5]" in again.getMessage()
    assert executable.compilations == 2


@pytest.mark.full("12 s for ten compilations")
def test_a_fixed_size_program_serves_more_sizes_than_torch_recompiles_by_default():
    program = torch.export.export(AddTwelve(), (), {"x": torch.ones(4)}, dynamic_shapes={"x": {0: Dim("n")}})
    executable = lower(program, dynamic=False)
    for size in range(2, 12):
        assert torch.equal(executable(x=torch.ones(size))["output"], torch.full((size,), 13.0))
    assert executable.compilations == 10


def test_unknown_backend(captured):
    with pytest.raises(ConfigError, match="backend is 'tensorflow'"):
        lower(captured.program, "tensorflow")
