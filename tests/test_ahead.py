"""Programs whose regions are compiled ahead of time compute what the routed graph computes."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conversations import BATCHES, NOISE, ROUTING, batch, forward_and_steps, new_tokens, unrouted_model

import reroute_fx
from reroute_fx.capture import capture_decoder, text_decoder
from reroute_fx.errors import CaptureError
from reroute_fx.lowering.ahead import load_region, package_region, schedule
from reroute_fx.lowering.schedule import ScheduledProgram
from reroute_fx.routing import continuation, route

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["llava", "qwen"])
def made(request, tmp_path_factory):
    """A routed model, and the same one on packages."""
    model, config = unrouted_model(request.param), ROUTING[request.param]
    captured, folder = capture_decoder(model), tmp_path_factory.mktemp("regions")
    programs = {
        "prefill": route(captured.program, config)[0],
        "continuation": continuation(captured.program, config.decision_layers),
    }
    scheduled = {name: schedule(program) for name, program in programs.items()}
    routed = reroute_fx.compile(model, config=config, backend="eager")
    packaged = reroute_fx.compile(model, config=config, backend="eager")
    for name, parts in scheduled.items():
        paths = [folder / f"{name}_{i}.pt2" for i in range(len(parts.regions))]
        for region, path in zip(parts.regions, paths, strict=True):
            package_region(region, CPU, path)
        weights = {**programs[name].state_dict, **programs[name].constants}
        program = ScheduledProgram(parts.schedule, [load_region(path) for path in paths], weights)
        setattr(text_decoder(packaged), name, program)
    return SimpleNamespace(
        family=request.param, routed=routed, packaged=packaged, scheduled=scheduled, folder=folder
    )


@pytest.mark.parametrize("rows", BATCHES)
@torch.no_grad()
def test_packages_compute_what_the_graph_computes(made, rows):
    inputs = batch(made.family, *BATCHES[rows])
    expected, found = made.routed(**inputs), made.packaged(**inputs)
    for layer in ROUTING[made.family].decision_layers:
        for ours, theirs in zip(found.routing.selected[layer], expected.routing.selected[layer], strict=True):
            assert torch.equal(ours, theirs)
    is_token = inputs["attention_mask"].bool()
    assert (found.logits - expected.logits)[is_token].abs().max() < NOISE
    steps = [forward_and_steps(model, inputs, [9, 10, 11])[:, -3:] for model in (made.packaged, made.routed)]
    assert (steps[0] - steps[1]).abs().max() < NOISE


@pytest.mark.parametrize("rows", BATCHES)
def test_packages_generate_the_same(made, rows):
    inputs = batch(made.family, *BATCHES[rows])
    answers = [
        new_tokens(model, inputs, max_new_tokens=12, do_sample=False)
        for model in (made.packaged, made.routed)
    ]
    assert torch.equal(*answers)


def test_regions_are_few_and_called_for_every_layer(made):
    calls = {name: len(parts.schedule.calls) for name, parts in made.scheduled.items()}
    regions = {name: len(parts.regions) for name, parts in made.scheduled.items()}
    assert calls["prefill"] > regions["prefill"]
    for parts in made.scheduled.values():
        assert {call.region for call in parts.schedule.calls} == set(range(len(parts.regions)))


def test_packages_hold_no_weights(made):
    """Each layer has 20 to 40 thousand of them, 4 bytes each; their values are spread and don't compress."""
    for path in made.folder.glob("*.pt2"):
        held = path.read_bytes()
        for weight in (p for p in unrouted_model(made.family).parameters() if p.ndim > 1):
            assert weight.detach().flatten()[:8].numpy().tobytes() not in held


def test_values_are_released_after_their_last_use(made):
    program = text_decoder(made.packaged).prefill
    released = [value for values in program.released for value in values]
    assert len(released) == len(set(released))
    assert not set(released) & set(program.schedule.outputs.values())


def test_a_region_that_is_fixed_to_a_size_is_refused(made, tmp_path):
    region = copy.deepcopy(made.scheduled["prefill"].regions[0])
    node = next(iter(region.graph.find_nodes(op="placeholder")))
    with region.graph.inserting_before(region.graph.output_node()):
        seven = region.graph.call_function(torch.ops.aten.arange.default, (7,))
        region.graph.call_function(torch.ops.aten.add.Tensor, (node, seven))
    region.recompile()
    with pytest.raises(CaptureError, match="fixed to"):
        package_region(region, CPU, tmp_path / "region.pt2")
    assert not (tmp_path / "region.pt2").exists()
