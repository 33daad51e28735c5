"""AttendToCache against a plain loop over rows and layers, and against one run over the whole sequence."""

import pytest
import torch
from suite_tiers import one

from reroute_fx.lowering import lower
from reroute_fx.passes import AttendToCache, MatchError, run_passes
from reroute_fx.pipeline import continuation, unrouted

aten = torch.ops.aten
STAGES = {
    "one": {0: (11, 4, 0)},
    "two": {0: (11, 4, 7), 1: (6, 4, 1)},
    "three": {0: (9, 12, 3), 1: (2, 0, 1), 2: (5, 8, 3)},
}


@pytest.fixture(scope="module")
def continued(exported):
    """A function ``(starts, **options) -> (model, program)``, each made once."""
    cache = {}

    def get(starts=(), layers=3, **options):
        model, program = exported(layers=layers, **options)
        if (program, starts) not in cache:
            cache[program, starts] = continuation(program, starts)
        return model, cache[program, starts]

    return get


def stage_starts(cached):
    return tuple(cached)[1:]


def stage_of(cached, layer):
    """First layer of the stage that a layer is in."""
    return max(start for start in cached if start <= layer)


def make_tokens(toy, batch, new, seed=4):
    """New tokens, whose positions ascend with gaps."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 5, (batch, new), generator=generator)
    return {
        "inputs_embeds": torch.randn(batch, new, toy.WIDTH, generator=generator),
        "position_ids": 20 + steps.cumsum(dim=1) + 3 * torch.arange(batch)[:, None],
    }


def make_cache(toy, model, cached, room, behind=0.0):
    """Random keys and values of `cached` tokens, for each first layer of a stage those of each row.

    Behind them lie `behind` and places for `room` more tokens in the longest row.
    """
    generator = torch.Generator().manual_seed(5)
    given = {}
    for index, layer in enumerate(model.layers):
        start = stage_of(cached, index)
        tokens = given[f"cached_{start}"] = torch.tensor(cached[start])
        capacity = max(cached[start]) + room
        is_cached = torch.arange(capacity) < tokens[:, None]
        for name in ("key", "value"):
            shape = len(tokens), layer.kv_heads, capacity, toy.HEAD_DIM
            states = torch.randn(shape, generator=generator)
            given[f"{name}_cache_{index}"] = states.where(is_cached[:, None, :, None], behind)
    return given


def continue_by_hand(toy, model, inputs, cached):
    """Output of the new tokens and their keys and values in each layer, each row alone."""
    names = [f"{name}_cache_{index}" for index in range(len(model.layers)) for name in ("key", "value")]
    found = {name: [] for name in ("output", *names)}
    with torch.no_grad():
        for row, stream in enumerate(inputs["inputs_embeds"]):
            angles = inputs["position_ids"][row, :, None] * model.frequencies
            for index, layer in enumerate(model.layers):
                count = cached[stage_of(cached, index)][row]
                pair = names[2 * index : 2 * index + 2]
                before = [inputs[name][row, :, :count].transpose(0, 1) for name in pair]
                stream, *new = toy.layer_by_hand(layer, stream, angles, before)
                for name, states in zip(pair, new, strict=True):
                    found[name].append(states.transpose(0, 1))
            found["output"].append(toy.normalised(stream, model.norm))
    return {name: torch.stack(rows) for name, rows in found.items()}


def expect(toy, model, inputs, cached):
    """What the loop finds and the tolerance of each."""
    exact = continue_by_hand(toy, toy.double(model), toy.in_double(inputs), cached)
    rounded = continue_by_hand(toy, model, inputs, cached)
    return exact, {name: toy.tolerance(rounded[name], exact[name]) for name in exact}


def is_written(inputs, start, cache, new):
    """The places ``[B, C]`` behind the cached tokens of a stage that take the new ones."""
    slot = torch.arange(cache.shape[2]) - inputs[f"cached_{start}"][:, None]
    return (slot >= 0) & (slot < new)


def assert_continues(toy, model, inputs, cached, run):
    """`run` gives the output of the loop and writes its keys and values behind the cached ones, nowhere else."""
    exact, tolerances = expect(toy, model, inputs, cached)
    given = {name: tensor.clone() for name, tensor in inputs.items()}
    result = run(given)
    assert result["routing"] == {}
    torch.testing.assert_close(result["output"].double(), exact["output"], rtol=0, atol=tolerances["output"])
    new = inputs["inputs_embeds"].shape[1]
    for name, tensor in given.items():
        if "_cache_" not in name:
            assert torch.equal(tensor, inputs[name]), name
            continue
        start = stage_of(cached, int(name.rpartition("_")[2]))
        places = is_written(inputs, start, tensor, new)
        assert places.sum() == len(places) * new
        rows, other = tensor.transpose(1, 2), inputs[name].transpose(1, 2)
        assert torch.equal(rows[~places], other[~places]), name
        wanted = exact[name].transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(rows[places].double(), wanted, rtol=0, atol=tolerances[name])


@one("half a second each")
@pytest.mark.parametrize("cached", STAGES.values(), ids=STAGES)
@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_against_the_loop(toy, continued, cached, new, kv_heads):
    model, program = continued(stage_starts(cached), kv_heads=kv_heads)
    inputs = make_tokens(toy, 3, new) | make_cache(toy, model, cached, room=new + 2)
    assert_continues(toy, model, inputs, cached, lambda given: toy.call(program, given))


def test_cached_tokens_matter(toy, continued):
    """Each layer's cache changes the output, and so does each row's number of tokens in it."""
    cached = STAGES["three"]
    model, program = continued(stage_starts(cached), kv_heads=2)
    inputs = make_tokens(toy, 3, 2) | make_cache(toy, model, cached, room=2)

    def run(**changed):
        given = {name: tensor.clone() for name, tensor in (inputs | changed).items()}
        return toy.call(program, given)["output"]

    plain = run()
    for name, tensor in inputs.items():
        if "_cache_" in name:
            other = run(**{name: tensor.roll(1, dims=2)})
        elif name.startswith("cached"):
            other = run(**{name: tensor - (tensor > 0).long()})
        else:
            continue
        changed = (other - plain).abs().amax(dim=(1, 2)) > 1e-3
        start = stage_of(cached, int(name.rpartition("_")[2]))
        assert torch.equal(changed, torch.tensor(cached[start]) > 0), name


@pytest.mark.parametrize("options", [{"parallel": True}, {"kv_heads": 2, "padding": True}, "eager"])
def test_other_decoders_against_the_loop(toy, continued, options):
    if options == "eager":
        options = {"kv_heads": 2, "attend": toy.eager, "mask": toy.additive_mask}
    cached = STAGES["two"]
    model, program = continued((1,), **options)
    inputs = make_tokens(toy, 3, 3) | make_cache(toy, model, cached, room=3)
    assert_continues(toy, model, inputs, cached, lambda given: toy.call(program, given))


def twice(run):
    def run_twice_as_large(decoder, hidden, cos, sin, mask):
        return run(decoder, hidden * 2, cos, sin, mask)

    return run_twice_as_large


def test_stream_that_is_no_input(toy):
    """The layers start from what the graph computes from its inputs."""
    model, cached = toy.Decoder(kv_heads=2, run=twice(toy.run_layers)), {0: (5, 2), 1: (3, 1)}
    program = continuation(toy.export(model), (1,))
    inputs = make_tokens(toy, 2, 3) | make_cache(toy, model, cached, room=3)
    doubled = inputs | {"inputs_embeds": inputs["inputs_embeds"] * 2}
    given = inputs["inputs_embeds"]
    assert_continues(
        toy, model, doubled, cached, lambda copies: toy.call(program, copies | {"inputs_embeds": given})
    )


@pytest.mark.parametrize("new", [1, 6])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_continuing_equals_one_run_over_everything(toy, exported, continued, new, kv_heads):
    """Rows of several lengths, padded at the end with other tokens that are overwritten and never seen."""
    model, program = continued(kv_heads=kv_heads)
    lengths, longest = (20, 13, 1), 20
    whole = toy.make_inputs(3, longest + new)
    whole["position_ids"] = whole["position_ids"] + (whole["position_ids"] > 30) * 7
    rows = torch.arange(3)[:, None]
    places = torch.tensor(lengths)[:, None] + torch.arange(new)
    tokens = {name: tensor[rows, places] for name, tensor in whole.items()}
    prompt = {name: tensor[:, :longest] for name, tensor in whole.items()}
    before = toy.call(unrouted(exported(layers=3, kv_heads=kv_heads)[1]), prompt)["routing"]
    caches = {"cached_0": torch.tensor(lengths)}
    for name, states in before.items():
        kind, _, index = name.partition(".")
        caches[f"{kind}_cache_{index}"] = torch.nn.functional.pad(states, (0, 0, 0, new))
    result = toy.call(program, tokens | caches)["output"]
    with torch.no_grad():
        exact = toy.double(model)(**toy.in_double(whole))[rows, places]
        rounded = model(**whole)[rows, places]
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=toy.tolerance(rounded, exact))


def test_chain_of_single_steps(toy, continued):
    """Five calls with one token each are one call with five."""
    cached = STAGES["three"]
    model, program = continued(stage_starts(cached), kv_heads=2)
    tokens, caches = make_tokens(toy, 3, 5), make_cache(toy, model, cached, room=5)
    exact, tolerances = expect(toy, model, tokens | caches, cached)
    outputs = []
    for step in range(5):
        one = {name: tensor[:, step : step + 1] for name, tensor in tokens.items()}
        outputs.append(toy.call(program, one | caches)["output"])
        for start in cached:
            caches[f"cached_{start}"] = caches[f"cached_{start}"] + 1
    result = torch.cat(outputs, dim=1)
    torch.testing.assert_close(result.double(), exact["output"], rtol=0, atol=tolerances["output"])


def test_rows_of_new_tokens_are_padded_at_the_end(toy, continued):
    """A row with fewer new tokens gives what it gives alone, and the next call writes over its padding."""
    cached = STAGES["two"]
    model, program = continued(stage_starts(cached), kv_heads=2)
    tokens, caches = make_tokens(toy, 3, 6), make_cache(toy, model, cached, room=9)
    exact, tolerances = expect(toy, model, tokens | caches, cached)
    rows, done = torch.arange(3)[:, None], torch.zeros(3, dtype=torch.long)
    outputs = [[], [], []]
    for counts in ((4, 1, 2), (2, 3, 1), (0, 2, 3)):
        width = max(counts)
        places = (done[:, None] + torch.arange(width)).clamp(max=5)
        given = {name: tensor[rows, places] for name, tensor in tokens.items()}
        is_padding = torch.arange(width) >= torch.tensor(counts)[:, None]
        given["inputs_embeds"][is_padding] = 100.0
        result = toy.call(program, given | caches)["output"]
        for row, count in enumerate(counts):
            outputs[row].append(result[row, :count])
        done = done + torch.tensor(counts)
        for start in cached:
            caches[f"cached_{start}"] = caches[f"cached_{start}"] + torch.tensor(counts)
    assert done.tolist() == [6, 6, 6]
    result = torch.stack([torch.cat(row) for row in outputs])
    torch.testing.assert_close(result.double(), exact["output"], rtol=0, atol=tolerances["output"])


@pytest.mark.parametrize("new", [1, 4])
def test_what_lies_behind_the_cached_tokens_is_never_read(toy, continued, new):
    cached = STAGES["three"]
    model, program = continued(stage_starts(cached), kv_heads=2)
    tokens = make_tokens(toy, 3, new)
    empty, full = (make_cache(toy, model, cached, room=9, behind=behind) for behind in (0.0, 1e30))
    first, second = (toy.call(program, tokens | caches)["output"] for caches in (empty, full))
    assert torch.equal(first, second)
    assert not any(torch.equal(empty[name], full[name]) for name in empty if "_cache_" in name)


def test_buffers_that_are_full(toy, continued):
    """The last place is used, and a token that has none is refused instead of written elsewhere."""
    cached = {0: (4, 4), 1: (2, 2)}
    model, program = continued((1,), kv_heads=2)
    inputs = make_tokens(toy, 2, 3) | make_cache(toy, model, cached, room=3)
    assert_continues(toy, model, inputs, cached, lambda given: toy.call(program, given))
    inputs = make_tokens(toy, 2, 3) | make_cache(toy, model, cached, room=2)
    with pytest.raises(IndexError, match="out of bounds"):
        toy.call(program, inputs)


def test_result_exports_again(toy, continued):
    model, program = continued((1,), layers=2, kv_heads=2)
    inputs = make_tokens(toy, 2, 7) | make_cache(toy, model, {0: (21, 17), 1: (9, 4)}, room=8)
    other = make_tokens(toy, 3, 3) | make_cache(toy, model, STAGES["two"], room=4)
    toy.assert_exports_again(program, inputs, other)


@pytest.mark.full("11 s; test_routed_model.py generates with compiled programs")
@pytest.mark.usefixtures("fresh_regions")
def test_compiled_programs_continue_too(toy, continued):
    """Every layer is the same code, whichever stage it is in."""
    cached = STAGES["two"]
    model, program = continued((1,), kv_heads=2)
    eager, compiled = lower(program, "eager"), lower(program, "inductor")
    assert (compiled.regions, compiled.distinct_regions) == (4, 2)  # masks once, and layers
    for room, new in ((6, 4), (3, 2)):
        inputs = make_tokens(toy, 3, new) | make_cache(toy, model, cached, room)
        for executable in (eager, compiled):
            assert_continues(toy, model, inputs, cached, lambda given, run=executable: run(**given))
    assert compiled.compilations == 2


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_nodes(toy, exported, kv_heads):
    _, program = exported(layers=3, kv_heads=kv_heads)
    before, _ = run_passes(program, toy.passes(4))
    graph, results = run_passes(program, [*toy.passes(4), AttendToCache((2,))])
    assert (results[-1].matched, results[-1].rewritten, results[-1].detail) == (3, 3, "2 stages")
    writes = toy.operators(graph.fx_graph, aten.index_put_)
    assert [node.meta["region"] for node in writes] == [f"layer.{i}" for i in (0, 0, 1, 1, 2, 2)]
    names = [f"{name}_cache_{index}" for index in range(3) for name in ("key", "value")]
    assert [node.args[0].name for node in writes] == names
    attentions = toy.operators(graph.fx_graph, aten.scaled_dot_product_attention)
    unchanged = toy.operators(before.fx_graph, aten.scaled_dot_product_attention)
    batch, new = graph.layers[0].start.meta["val"].shape[:2]
    for index, (attention, old) in enumerate(zip(attentions, unchanged, strict=True)):
        query, keys, values, mask, _, is_causal = attention.args
        assert [keys, values] == writes[2 * index : 2 * index + 2]
        assert attention.kwargs == old.kwargs
        assert is_causal is False
        capacity = keys.meta["val"].shape[2]
        assert query.meta["val"].shape == (batch, toy.HEADS, new, toy.HEAD_DIM)
        for node in (keys, values):
            assert node.meta["val"].shape == (batch, kv_heads, capacity, toy.HEAD_DIM)
        assert mask.meta["val"].shape == (batch, 1, new, capacity)
        assert mask.meta["val"].dtype == torch.bool
        assert mask.meta["region"] == f"slots.{0 if index < 2 else 2}"
        assert attention.meta["val"].shape == old.meta["val"].shape
    masks = [attention.args[3] for attention in attentions]
    assert masks[0] is masks[1]
    assert masks[1] is not masks[2]


def test_added_inputs(exported):
    _, program = exported(layers=3, kv_heads=2)
    edited = continuation(program, (1,))
    shapes = {n.name: n.meta["val"] for n in edited.graph.find_nodes(op="placeholder")}
    added = list(edited.graph_signature.user_inputs)[2:]
    assert added == [
        *("cached_0", "key_cache_0", "value_cache_0"),
        *("cached_1", "key_cache_1", "value_cache_1", "key_cache_2", "value_cache_2"),
    ]
    assert [shapes[name].dtype for name in added if name.startswith("cached")] == [torch.int64] * 2
    assert {shapes[name].dtype for name in added if "_cache_" in name} == {torch.float32}
    capacities = [str(shapes[f"{name}_cache_{i}"].shape[2]) for i in range(3) for name in ("key", "value")]
    assert capacities[0] == capacities[1] != capacities[2]
    assert len(set(capacities[2:])) == 1
    assert str(shapes["inputs_embeds"].shape[1]) not in capacities


@pytest.mark.parametrize("starts", [(3,), (1, 5)])
def test_stage_beyond_the_decoder_is_refused(exported, starts):
    _, program = exported(layers=3, kv_heads=2)
    message = rf"stage_starts has {starts[-1]}, but the graph has 3 layers; expected 1\.\.2"
    with pytest.raises(MatchError, match=message):
        continuation(program, starts)


def test_wrong_number_of_layers_is_refused(exported):
    _, program = exported(layers=3, kv_heads=2)
    with pytest.raises(MatchError, match="3 decoder layers were found; expected 4"):
        continuation(program, (1,), num_layers=4)


def test_program_without_attention_is_refused(toy):
    program = toy.export(torch.nn.Linear(toy.WIDTH, toy.WIDTH), {"input": torch.zeros(2, 64, toy.WIDTH)})
    with pytest.raises(MatchError, match="No attention was found"):
        continuation(program)


def test_program_that_has_a_cache_already_is_refused(continued):
    _, program = continued((1,), kv_heads=2)
    with pytest.raises(MatchError, match="writes into memory"):
        continuation(program, (1,))


def counted_rotary(toy):
    def turn(decoder, position_ids):
        return toy.rotary(decoder, torch.arange(position_ids.shape[1])[None])

    return turn


def counted_bias(decoder, hidden, cos, sin, mask):
    bias = torch.arange(hidden.shape[1])[:, None] * decoder.norm.weight
    for layer in decoder.layers:
        hidden = layer(hidden + bias, cos, sin, mask)
    return hidden


def sum_before_the_layers(decoder, hidden, cos, sin, mask):
    hidden = hidden + hidden.cumsum(dim=1)
    for layer in decoder.layers:
        hidden = layer(hidden, cos, sin, mask)
    return hidden


@pytest.mark.parametrize("kind", ["rotary positions", "bias", "sum over tokens"])
def test_what_depends_on_earlier_tokens_outside_attention_is_refused(toy, kind):
    """The new tokens alone would be counted from 0 again and summed from nothing, whatever is in the cache."""
    options = {
        "rotary positions": {"turn": counted_rotary(toy)},
        "bias": {"run": counted_bias},
        "sum over tokens": {"run": sum_before_the_layers},
    }[kind]
    program = toy.export(toy.Decoder(**options))
    with pytest.raises(MatchError):
        continuation(program, (1,))


def test_four_layers_of_a_stage_are_one_region(exported):
    _, program = exported(layers=7)
    graph = continuation(program, (2,)).graph_module.graph
    writes = [n.meta["region"] for n in graph.nodes if n.target is torch.ops.aten.index_put_.default]
    assert writes == ["layer.0"] * 2 + ["layer.1"] * 2 + ["layer.2-5"] * 8 + ["layer.6"] * 2
