"""run_passes and to_program: dumps, an untouched original, shared parameters, signatures."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from torch import nn

from reroute_fx import RoutingConfig, Savings, route
from reroute_fx.passes import (
    DUMP_VARIABLE,
    AttendToCache,
    CanonicalizeAttention,
    ExposeOutputs,
    FindLayers,
    InsertSelection,
    MatchError,
    NumberStages,
    PassResult,
    ProveCausal,
    ReduceFeatures,
    RemoveNoOps,
    RestoreInPlace,
    RouteStages,
    run_passes,
    to_program,
)
from reroute_fx.pipeline import continuation, unrouted

CONFIG = RoutingConfig((1,), (0.4,), "compact_route_stagewise")
DELETING = RoutingConfig((1,), (0.7,), "physical_delete")


def make_inputs(toy, config=CONFIG, **options):
    return toy.make_prompt(config, (40, 33), ((17,), (20,)), **options)


def assert_equal_results(first, second):
    assert torch.equal(first["output"], second["output"])
    assert first["routing"].keys() == second["routing"].keys()
    for name, tensor in first["routing"].items():
        assert torch.equal(tensor, second["routing"][name]), name


def test_results_name_the_passes(exported):
    _, program = exported(kv_heads=2)
    _, report = route(program, CONFIG)
    assert [result.name for result in report.passes] == [
        "RemoveNoOps",
        "WriteOutComplex",
        "CanonicalizeAttention",
        "ProveCausal",
        "FindLayers",
        "InsertSelection",
        "RouteStages",
        "RestoreInPlace",
        "CarryStates",
        "ExposeOutputs",
    ]
    assert all(result.seconds > 0 for result in report.passes)
    assert all(result.rejected == () for result in report.passes)


def test_results_are_frozen(exported):
    _, program = exported(kv_heads=2)
    _, (result,) = run_passes(program, [RemoveNoOps()])
    assert isinstance(result, PassResult)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.matched = 7
    with pytest.raises(dataclasses.FrozenInstanceError):
        del result.detail


def test_dumps_are_numbered(toy, exported, monkeypatch, tmp_path):
    _, program = exported(kv_heads=2)
    folder = tmp_path / "dumps" / "of a run"
    monkeypatch.setenv(DUMP_VARIABLE, str(folder))
    graph, _ = run_passes(program, toy.passes(4))
    names = ["RemoveNoOps", "CanonicalizeAttention", "ProveCausal", "FindLayers"]
    expected = {f"{i:03d}_{name}.{time}.txt" for i, name in enumerate(names) for time in ("before", "after")}
    assert {path.name for path in folder.iterdir()} == expected
    for number, (name, following) in enumerate(pairwise(names)):
        after = (folder / f"{number:03d}_{name}.after.txt").read_text()
        assert after == (folder / f"{number + 1:03d}_{following}.before.txt").read_text()
    canonical = [
        (folder / f"001_CanonicalizeAttention.{time}.txt").read_text() for time in ("before", "after")
    ]
    assert ["enable_gqa=True" in text for text in canonical] == [False, True]
    assert (folder / "003_FindLayers.after.txt").read_text() == graph.to_text()


def test_dumps_go_on_counting_and_delete_nothing(toy, exported, monkeypatch, tmp_path):
    _, program = exported(kv_heads=2)
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setenv(DUMP_VARIABLE, str(tmp_path))
    run_passes(program, [RemoveNoOps()])
    first = {path.name: path.read_text() for path in tmp_path.iterdir()}
    run_passes(program, toy.passes(2))
    both = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert first.items() <= both.items()
    assert both["notes.txt"] == "mine"
    new = {name.split(".")[0] for name in set(both) - set(first)}
    assert new == {"001_RemoveNoOps", "002_CanonicalizeAttention"}


def test_dumps_never_overwrite(exported, monkeypatch, tmp_path):
    """The first dump of an earlier run was moved away, the second one is still there."""
    _, program = exported(kv_heads=2)
    earlier = tmp_path / "001_RemoveNoOps.before.txt"
    earlier.write_text("earlier")
    monkeypatch.setenv(DUMP_VARIABLE, str(tmp_path))
    run_passes(program, [RemoveNoOps()])
    assert earlier.read_text() == "earlier"
    assert len(list(tmp_path.glob("*.before.txt"))) == 2


def test_refused_pass_leaves_what_it_saw(toy, exported, monkeypatch, tmp_path):
    _, program = exported(kv_heads=2)
    monkeypatch.setenv(DUMP_VARIABLE, str(tmp_path))
    with pytest.raises(MatchError):
        run_passes(program, [*toy.passes(3), FindLayers(7)])
    assert (tmp_path / "003_FindLayers.before.txt").exists()
    assert not (tmp_path / "003_FindLayers.after.txt").exists()


def test_nothing_is_dumped_without_the_variable(exported, monkeypatch, tmp_path):
    _, program = exported(kv_heads=2)
    monkeypatch.delenv(DUMP_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    run_passes(program, [RemoveNoOps()])
    assert list(tmp_path.iterdir()) == []


def fingerprint(program):
    nodes = [
        (n.name, n.op, str(n.target), str(n.args), str(n.kwargs), sorted(n.meta)) for n in program.graph.nodes
    ]
    shapes = [str(getattr(n.meta.get("val"), "shape", None)) for n in program.graph.nodes]
    return nodes, shapes, str(program.graph_signature), str(program.range_constraints), str(program.call_spec)


def test_original_is_unchanged_and_can_be_routed_again(toy, exported):
    _, program = exported(padding=True, kv_heads=2)
    before = fingerprint(program)
    inputs = make_inputs(toy, padding=True)
    other = make_inputs(toy, DELETING)
    plain = toy.call(program, inputs)
    first, _ = route(program, CONFIG)
    results = toy.call(first, inputs)
    assert fingerprint(program) == before
    deleting, _ = route(program, DELETING)
    assert fingerprint(program) == before
    continuation(program, (1,))
    assert fingerprint(program) == before
    again, _ = route(program, CONFIG)
    assert torch.equal(toy.call(program, inputs), plain)
    assert_equal_results(toy.call(first, inputs), results)
    assert_equal_results(toy.call(again, inputs), results)
    assert toy.call(deleting, other)["routing"]["kept.1"].sum(1).tolist() == [11, 14]
    assert results["routing"]["kept.1"].sum(1).tolist() == [6, 8]


def test_routed_program_is_not_routed_again(exported):
    """Its layers run on compact rows, so there is no stream of S rows around them; or it writes in place."""
    _, program = exported(kv_heads=2)
    once, _ = route(program, CONFIG, savings=Savings(restore_in_place=False))
    with pytest.raises(MatchError):
        route(once, CONFIG)
    in_place, _ = route(program, CONFIG)
    with pytest.raises(MatchError, match=r"restore_tokens_.*knows no other way"):
        route(in_place, CONFIG)


def test_parameters_are_shared(exported):
    model, program = exported(padding=True, kv_heads=2)
    routed, _ = route(program, CONFIG)
    parameters = dict(model.named_parameters()) | dict(model.named_buffers())
    for other in (routed, unrouted(program), continuation(program, (1,))):
        assert other.state_dict.keys() == program.state_dict.keys() == parameters.keys()
        for name, tensor in parameters.items():
            assert (
                other.state_dict[name].data_ptr() == tensor.data_ptr() == program.state_dict[name].data_ptr()
            )
        module = other.module(check_guards=False)
        for name, tensor in module.named_parameters():
            assert tensor.data_ptr() == parameters[name].data_ptr()


def test_weights_that_change_later_count(toy):
    model = toy.Decoder()
    routed, _ = route(toy.export(model), CONFIG)
    inputs = make_inputs(toy)
    before = toy.call(routed, inputs)["output"]
    with torch.no_grad():
        model.norm.weight.mul_(2)
    assert torch.equal(toy.call(routed, inputs)["output"], before * 2)


ADDED = {
    "routed": ["visual_index", "lengths", "keep_1", "slots_1"],
    "continuation": [
        *("cached_0", "key_cache_0", "value_cache_0"),
        *("cached_1", "key_cache_1", "value_cache_1"),
    ],
    "unrouted": [],
}


def make_program(kind, program):
    """The routed program, the one that continues it, or the one that routes nothing."""
    if kind == "routed":
        return route(program, CONFIG)[0]
    return continuation(program, CONFIG.decision_layers) if kind == "continuation" else unrouted(program)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("kind", ADDED)
def test_signature(exported, padding, kind):
    _, program = exported(padding=padding, kv_heads=2)
    edited = make_program(kind, program)
    original = ["inputs_embeds", "position_ids"] + (["attention_mask"] if padding else [])
    assert list(program.graph_signature.user_inputs) == original
    assert list(edited.graph_signature.user_inputs) == ["inputs_embeds", "position_ids", *ADDED[kind]]
    assert edited.graph_signature.parameters == program.graph_signature.parameters
    assert edited.graph_signature.buffers == program.graph_signature.buffers
    placeholders = [n.name for n in edited.graph.find_nodes(op="placeholder")]
    assert placeholders == [spec.arg.name for spec in edited.graph_signature.input_specs]
    returned = [n.name for n in edited.graph.output_node().args[0]]
    assert returned == list(edited.graph_signature.user_outputs)


def test_padding_is_no_argument_any_more(toy, exported):
    _, program = exported(padding=True, kv_heads=2)
    routed, _ = route(program, CONFIG)
    inputs = make_inputs(toy, padding=True)
    with pytest.raises(Exception, match="attention_mask"):
        routed.module(check_guards=False)(**inputs)


class ByPlace(nn.Module):
    """Takes its inputs by place."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, inputs_embeds, position_ids, attention_mask):
        return self.decoder(inputs_embeds, position_ids, attention_mask)


def test_inputs_given_by_place(toy, exported):
    model, by_name = exported(padding=True, kv_heads=2)
    inputs = toy.make_inputs(padding=True)
    sizes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=1)}
    with torch.no_grad():
        program = torch.export.export(ByPlace(model), tuple(inputs.values()), dynamic_shapes=(sizes,) * 3)
        routed = route(program, CONFIG)[0].module(check_guards=False)
        inputs = make_inputs(toy)
        added = {name: inputs[name] for name in ADDED["routed"]}
        result = routed(inputs["inputs_embeds"], inputs["position_ids"], **added)
    assert_equal_results(result, toy.call(route(by_name, CONFIG)[0], inputs))


@pytest.mark.parametrize(
    ("kind", "new"),
    [("routed", {"visual_index", "slots_1"}), ("continuation", {"key_cache_0", "key_cache_1"})],
)
def test_sizes_of_the_edited_program_are_symbolic(exported, kind, new):
    """Each of the `new` inputs brings in a size."""
    _, program = exported(padding=True, kv_heads=2)
    edited = make_program(kind, program)
    shapes = {n.name: n.meta["val"].shape for n in edited.graph.find_nodes(op="placeholder")}
    batch, length = shapes["inputs_embeds"][:2]
    assert isinstance(batch, torch.SymInt)
    assert isinstance(length, torch.SymInt)
    sizes = {batch.node.expr, length.node.expr}
    for name in ADDED[kind]:
        if not name.startswith("slots"):
            assert shapes[name][0].node.expr == batch.node.expr
        if name in new:
            sizes.add(shapes[name][2 if "cache" in name else -1].node.expr)
    assert len(sizes) == 2 + len(new)
    assert set(edited.range_constraints) == sizes


def test_routed_program_survives_saving(toy, exported, tmp_path):
    _, program = exported(kv_heads=2)
    routed, _ = route(program, CONFIG)
    torch.export.save(routed, tmp_path / "routed.pt2")
    inputs = make_inputs(toy)
    assert_equal_results(
        toy.call(torch.export.load(tmp_path / "routed.pt2"), inputs), toy.call(routed, inputs)
    )


def test_unrouted_computes_the_same(toy, exported):
    model, program = exported(padding=True, kv_heads=2)
    toy.assert_agrees(unrouted(program), model, toy.make_inputs(3, 40, padding=True))


def test_passes_can_be_run_without_routing(toy, exported):
    model, program = exported(padding=True, kv_heads=2)
    graph, results = run_passes(program, [])
    assert results == ()
    toy.assert_agrees(to_program(graph, program), model, toy.make_inputs(3, 40, padding=True))


FIND = [RemoveNoOps(), CanonicalizeAttention(), ProveCausal(), FindLayers()]
DECIDE = [*FIND, InsertSelection((1,))]
STAGE = [*DECIDE, RouteStages("compact_route")]
WRONG_ORDERS = {
    "causal before canonical": (
        [ProveCausal()],
        "ProveCausal requires canonical attention",
        "CanonicalizeAttention",
    ),
    "layers before causal": (
        [CanonicalizeAttention(), FindLayers()],
        "requires causal attention",
        "ProveCausal",
    ),
    "selection before layers": (
        [*FIND[:3], InsertSelection((1,))],
        "InsertSelection requires layers",
        "FindLayers",
    ),
    "stages before layers": ([RouteStages("compact_route")], "RouteStages requires layers", "FindLayers"),
    "stages before decisions": (
        [*FIND, RouteStages("compact_route")],
        "requires decisions",
        "InsertSelection",
    ),
    "in place before stages": ([*FIND, RestoreInPlace()], "RestoreInPlace requires stages", "RouteStages"),
    "outputs before layers": ([*FIND[:3], ExposeOutputs()], "ExposeOutputs requires layers", "FindLayers"),
    "cache before layers": (
        [RemoveNoOps(), AttendToCache((1,))],
        "AttendToCache requires layers",
        "FindLayers",
    ),
    "numbers before layers": ([NumberStages((1,))], "NumberStages requires layers", "FindLayers"),
    "numbers after the cache": (
        [*FIND, AttendToCache(), NumberStages((1,))],
        "a graph with caches",
        "AttendToCache",
    ),
    "cache after decisions": ([*DECIDE, AttendToCache()], "a graph with decisions", "InsertSelection"),
    "layers after stages": ([*STAGE, FindLayers()], "a graph with decisions", "InsertSelection"),
    "outputs before stages": (
        [*DECIDE, ExposeOutputs(), RouteStages("compact_route")],
        "with outputs",
        "ExposeOut",
    ),
    "selection twice": (
        [*DECIDE, InsertSelection((1,))],
        "can't run on a graph with decisions",
        "InsertSelection",
    ),
    "stages twice": (
        [*STAGE, RouteStages("compact_route")],
        "can't run on a graph with stages",
        "RouteStages",
    ),
    "outputs twice": (
        [*FIND, ExposeOutputs(), ExposeOutputs()],
        "can't run on a graph with outputs",
        "ExposeOut",
    ),
    "cache twice": (
        [*FIND, AttendToCache(), AttendToCache()],
        "can't run on a graph with caches",
        "AttendToCache",
    ),
    "reduction without states": (
        [CanonicalizeAttention(), ReduceFeatures(max, 4, 2)],
        "requires states",
        "FindStates",
    ),
}


@pytest.mark.parametrize("order", WRONG_ORDERS)
def test_passes_in_the_wrong_order_are_refused(exported, order):
    _, program = exported(kv_heads=2)
    steps, message, named = WRONG_ORDERS[order]
    with pytest.raises(MatchError, match=rf"{message}.*{named}"):
        run_passes(program, steps)


def test_finding_twice_is_no_error(exported):
    _, program = exported(kv_heads=2)
    graph, results = run_passes(program, [*FIND, *FIND])
    assert len(graph.layers) == results[-1].matched == 2
    assert graph.facts == {"canonical attention", "causal attention", "layers"}


def writes_in_place(decoder, hidden, cos, sin, mask):
    hidden = hidden * 1.0
    hidden[:, :, 0] = 3.0
    for layer in decoder.layers:
        hidden = layer(hidden, cos, sin, mask)
    return hidden


def test_program_that_writes_in_place_is_refused(exported):
    """The write has no reader in the graph: removing it as dead code would change the result."""
    _, program = exported(run=writes_in_place)
    assert any(n.target is torch.ops.aten.fill_.Scalar or "fill_" in n.name for n in program.graph.nodes)
    with pytest.raises(MatchError, match="%fill_"):
        run_passes(program, [RemoveNoOps()])
