"""Writes into memory: decomposed where no other value can tell, refused elsewhere, before and after saving."""

import pytest
import torch
from suite_tiers import one
from torch.export import Dim

from reroute_fx import RoutingConfig, route
from reroute_fx.passes import MatchError, RemoveNoOps, run_passes, to_program
from reroute_fx.passes.memory import may_share_memory, shared_memory

aten = torch.ops.aten
CONFIG = RoutingConfig((1,), (0.4,), "compact_route_stagewise")


def scaled(hidden):
    return (hidden * 2.0).mul_(0.5)


def twice(hidden):
    hidden = hidden * 1.0
    hidden.add_(1.0)
    return hidden.sub_(1.0)


def view_of_a_view(hidden):
    """What is older and shares the memory is not read any more."""
    return (hidden * 2.0).view(*hidden.shape[:2], -1, 8).mul_(0.5).flatten(2)


def one_of_two_results(hidden):
    """The indices beside the values have memory of their own."""
    values, order = hidden.sort(dim=-1)
    values.mul_(0.0)
    return hidden + values + 0 * order


def computed(hidden):
    return torch.nn.functional.layer_norm(hidden, hidden.shape[-1:]).mul_(0.0) + hidden


def into_a_view(hidden):
    hidden = hidden * 1.0
    hidden[:, :, 0] = 3.0
    return hidden


def into_a_part(hidden):
    hidden = hidden * 1.0
    first, _ = hidden.split(16, dim=-1)
    first.mul_(2.0)
    return hidden


def read_through_an_older_view(hidden):
    hidden = hidden * 1.0
    first = hidden[..., :16]
    hidden.mul_(2.0)
    return torch.cat((first, hidden[..., 16:]), dim=-1)


def copied_into(hidden):
    made = torch.empty_like(hidden)
    made[..., :16].copy_(hidden[..., 16:])
    made[..., 16:].copy_(hidden[..., :16])
    return made


def into_what_dropout_returns(hidden):
    """Outside training it is its argument, though its schema says nothing of it."""
    hidden = hidden * 1.0
    torch.nn.functional.dropout(hidden, 0.5, training=False).mul_(2.0)
    return hidden


def into_an_input(hidden):
    return hidden.reshape(hidden.shape).mul_(2.0)


HARMLESS = [scaled, twice, view_of_a_view, one_of_two_results, computed]
HARMFUL = [
    into_a_view,
    into_a_part,
    read_through_an_older_view,
    copied_into,
    into_what_dropout_returns,
    into_an_input,
]


def decoder(toy, change):
    """A decoder that begins with `change`, exported."""

    def run(decoder, hidden, cos, sin, mask):
        return toy.run_layers(decoder, change(hidden), cos, sin, mask)

    model = toy.Decoder(kv_heads=2, run=run)
    return model, toy.export(model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function that saves a program and loads it again."""

    def reload(program):
        path = tmp_path_factory.mktemp("programs") / "program.pt2"
        torch.export.save(program, path)
        return torch.export.load(path)

    return reload


@one("2 s each")
@pytest.mark.parametrize("change", HARMLESS)
def test_harmless_writes_are_decomposed_before_and_after_saving(toy, saved, change):
    _, program = decoder(toy, change)
    assert any(n.target._schema.is_mutable for n in program.graph.nodes if hasattr(n.target, "_schema"))
    for source in (program, saved(program)):
        graph, _ = run_passes(source, [RemoveNoOps()])
        assert not any(
            n.target._schema.is_mutable for n in graph.fx_graph.nodes if hasattr(n.target, "_schema")
        )
        edited = to_program(graph, source, as_original=True)
        inputs = toy.make_inputs(3, 40)
        torch.testing.assert_close(toy.call(edited, inputs), toy.call(program, inputs), rtol=1e-5, atol=1e-5)


@one("2 s each")
@pytest.mark.parametrize("change", HARMFUL)
def test_writes_that_other_values_see_are_refused_before_and_after_saving(toy, saved, change):
    _, program = decoder(toy, change)
    for source in (program, saved(program)):
        with pytest.raises(
            MatchError, match=r"writes into memory that other values share.*run_decompositions"
        ):
            route(source, CONFIG)


@pytest.mark.full("9 s; another export of a model")
def test_a_decomposed_program_is_routed(toy, saved):
    """As the refusal advises."""
    _, program = decoder(toy, into_a_view)
    inputs = toy.make_prompt(CONFIG, (40, 33), ((17,), (20,)))
    core = program.run_decompositions({})
    results = [toy.call(route(source, CONFIG)[0], inputs)["output"] for source in (core, saved(core))]
    without, _ = route(decoder(toy, lambda hidden: hidden * 1.0)[1], CONFIG)
    assert torch.equal(*results)
    assert not torch.allclose(results[0], toy.call(without, inputs)["output"])


def test_an_addition_that_rounds_is_refused_and_taken_as_the_refusal_advises(toy):
    """In place it rounds to bfloat16; the ordinary addition of the two gives float32."""

    class Rounds(torch.nn.Module):
        def forward(self, hidden, other):
            return (hidden * 2).add_(other)

    hidden = torch.ones(2, 4, dtype=torch.bfloat16)
    sizes = {0: Dim("batch", min=1)}
    example = {"hidden": hidden, "other": torch.ones(2, 4)}
    program = torch.export.export(Rounds(), (), example, dynamic_shapes={"hidden": sizes, "other": sizes})
    with pytest.raises(MatchError, match=r"%add_.*writes into.*Call run_decompositions\(\) on it first"):
        run_passes(program, [RemoveNoOps()])
    core = program.run_decompositions({})
    graph, _ = run_passes(core, [RemoveNoOps()])
    given = {"hidden": hidden / 3, "other": torch.rand(2, 4, generator=torch.Generator().manual_seed(0))}
    assert torch.equal(toy.call(to_program(graph, core), given)["output"], Rounds()(**given))


def test_memory_by_schema_covers_memory_by_storage(toy, exported):
    """Fake tensors before saving say who shares; each such pair has to be found without them."""
    _, program = exported(kv_heads=2, padding=True)
    groups = shared_memory(program.graph.nodes)
    tensors = [n for n in program.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    storages = {n: n.meta["val"].untyped_storage()._cdata for n in tensors}
    pairs = [(a, b) for a in tensors for b in tensors if storages[a] == storages[b]]
    assert len(pairs) > len(tensors)
    assert all(b in groups[a] for a, b in pairs)
    assert not any(may_share_memory(n) for n in program.graph.nodes if n.target is aten.linear.default)
