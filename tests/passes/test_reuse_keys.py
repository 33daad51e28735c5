"""ReuseKeys: a decision layer's keys are computed once, for scoring, and gathered for the layer."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from golden_models import decoder_inputs

from reroute_fx import RoutingConfig
from reroute_fx.capture import capture_decoder
from reroute_fx.lowering.regions import share_regions
from reroute_fx.passes import (
    ACTIONS,
    ExposeOutputs,
    InsertSelection,
    Pass,
    PassResult,
    ReuseKeys,
    RouteStages,
    run_passes,
    to_program,
)
from reroute_fx.routing import find_passes

aten = torch.ops.aten
reroute = torch.ops.reroute
CONFIG = RoutingConfig((1, 2), (0.5, 0.3))
ONE_DECISION = RoutingConfig((1,), (0.5,))
LENGTHS, IMAGES = (30, 40, 22), ((5, 11), (), (4, 4, 1))
NOISE = {"rtol": 1e-5, "atol": 1e-5}
"""Float32 rounding: BLAS may add in another order when there are more rows. Another row differs by 1e-1 and more."""


def routing(config):
    return [InsertSelection(config.decision_layers, config.pool == "image"), RouteStages(config.action)]


def edit(program, config, found, reuse, *between):
    """The routed graph, with `between` after RouteStages, and the last result before ExposeOutputs."""
    steps = [*found, *routing(config), *between, *([ReuseKeys()] if reuse else [])]
    graph, results = run_passes(program, [*steps, ExposeOutputs()])
    return graph, results[-2]


def with_and_without(toy, program, config, *between):
    """Graphs with the pass and without, and what the pass says."""
    with_pass, result = edit(program, config, toy.passes(4), True, *between)
    without, _ = edit(program, config, toy.passes(4), False, *between)
    return with_pass, without, result


def products_with(toy, graph, name):
    """Linear maps with the weight `name`."""
    return [n for n in toy.operators(graph.fx_graph, aten.linear) if n.args[1].name == name]


def saved(toy, with_pass, without, *operators):
    """Matrix products that the pass has removed."""
    operators = operators or (aten.linear,)
    return len(toy.operators(without.fx_graph, *operators)) - len(
        toy.operators(with_pass.fx_graph, *operators)
    )


def assert_same(result, wanted, inputs, config):
    """What the programs return is the same up to noise, apart from places that hold no token."""
    assert torch.equal(result["output"].isnan(), wanted["output"].isnan())
    torch.testing.assert_close(result["output"], wanted["output"], **NOISE)
    text = inputs["lengths"] - (inputs["visual_index"] < inputs["lengths"][:, None]).sum(1)
    for name, tensor in wanted["routing"].items():
        kind, _, layer = name.partition(".")
        if kind == "kept":
            assert torch.equal(result["routing"][name], tensor)
        elif kind == "scores":
            torch.testing.assert_close(result["routing"][name], tensor, **NOISE)
        else:
            before = [index for index in config.decision_layers if index <= int(layer)]
            tokens = text + wanted["routing"][f"kept.{before[-1]}"].sum(1) if before else inputs["lengths"]
            for row, count in enumerate(tokens.tolist()):
                given = result["routing"][name][row, :, :count]
                torch.testing.assert_close(given, tensor[row, :, :count], **NOISE)


def run_both(toy, program, config, with_pass, without):
    inputs = toy.make_prompt(config, LENGTHS, IMAGES, places=43)
    results = [toy.call(to_program(graph, program), inputs) for graph in (with_pass, without)]
    assert_same(*results, inputs, config)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("config", [ONE_DECISION, CONFIG], ids=["one", "two"])
def test_keys_are_computed_once(toy, exported, action, kv_heads, config):
    _, program = exported(layers=4, kv_heads=kv_heads)
    with_pass, without, result = with_and_without(toy, program, replace(config, action=action))
    count = len(config.decision_layers)
    assert (result.name, result.matched, result.rewritten, result.rejected) == ("ReuseKeys", count, count, ())
    assert saved(toy, with_pass, without) == count
    for decision in with_pass.decisions:
        name = f"p_layers_{decision.layer}_key_weight"
        assert len(products_with(toy, without, name)) == 2
        (product,) = products_with(toy, with_pass, name)
        assert product.meta["region"] == f"decision.{decision.layer}"
        first, *later = [
            n
            for n in toy.operators(with_pass.fx_graph, reroute.compact_tokens)
            if n.args[1] is decision.positions
        ]
        assert [product in call.args[0] for call in (first, *later)] == [True] + [False] * len(later)
        place = first.args[0].index(product)
        assert first.args[2][place] == 1
        (gathered,) = [n for n in first.users if n.args[1] == place]
        assert gathered.meta["region"] == f"compact.{decision.layer}" == first.meta["region"]
        batch, active = decision.positions.meta["val"].shape
        assert gathered.meta["val"].shape == (batch, active, kv_heads * toy.HEAD_DIM)
        assert first.meta["val"][place].shape == gathered.meta["val"].shape


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("pool", ["row", "image"])
def test_numbers_are_those_without_the_pass(toy, exported, action, pool):
    _, program = exported(layers=4, kv_heads=2)
    config = replace(CONFIG, action=action, pool=pool)
    with_pass, without, _ = with_and_without(toy, program, config)
    run_both(toy, program, config, with_pass, without)


@pytest.mark.parametrize("action", ACTIONS)
def test_only_the_first_compaction_of_a_stage_changes(toy, exported, action):
    """The query's row is gathered as before, and so are later layers of `compact_route`."""
    _, program = exported(layers=4, kv_heads=2)
    with_pass, without, _ = with_and_without(toy, program, replace(CONFIG, action=action))
    sizes = [
        [len(n.args[0]) for n in toy.operators(graph.fx_graph, reroute.compact_tokens)]
        for graph in (with_pass, without)
    ]
    more = [a - b for a, b in zip(*sizes, strict=True)]
    assert sorted(more) == [0] * (len(more) - 2) + [1, 1]
    for graph in (with_pass, without):
        of_query = [n for n in toy.operators(graph.fx_graph, reroute.compact_tokens) if len(n.args[0]) == 1]
        places = {n.args[1] for n in of_query} - {d.positions for d in graph.decisions}
        assert len(places) == 2  # one last token for each decision


def projecting(toy, project):
    """Layers whose ``project(layer, normed)`` gives query, key and value."""

    def run(decoder, hidden, cos, sin, mask):
        for layer in decoder.layers:
            projected = project(layer, layer.input_norm(hidden))
            query, key, value = map(layer.split_heads, projected)
            query, key = (toy.rotate(x, cos, sin) for x in (query, key))
            mixed = toy.sdpa(query, key, value, mask)
            hidden = hidden + layer.output(mixed.transpose(1, 2).flatten(2))
            hidden = hidden + layer.mlp(layer.output_norm(hidden))
        return hidden

    return toy.export(toy.Decoder(layers=3, run=run))


def plain_product(layer, normed):
    return layer.query(normed), normed @ layer.key.weight.t() + layer.key.bias, layer.value(normed)


def fused(layer, normed):
    weight = torch.cat([layer.query.weight, layer.key.weight, layer.value.weight])
    return F.linear(normed, weight).chunk(3, dim=-1)


def normed_keys(layer, normed):
    heads = layer.key(normed).unflatten(-1, (-1, 8))
    return layer.query(normed), F.rms_norm(heads, (8,)).flatten(-2), layer.value(normed)


def chained(layer, normed):
    return layer.query(normed), layer.key(layer.mlp(normed)), layer.value(normed)


def shared_chain(layer, normed):
    """Keys and values of one narrower projection."""
    compressed = layer.mlp(normed)
    return layer.query(normed), layer.key(compressed), layer.value(F.silu(compressed))


DECODERS = {
    # Products removed and products gathered at each of two decisions.
    "plain product": (plain_product, 1, 1),
    "fused": (fused, 1, 1),
    "normed keys": (normed_keys, 1, 1),
    "chained": (chained, 4, 1),
    "shared chain": (shared_chain, 4, 2),
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_other_projections(toy, action, decoder):
    project, fewer, gathered = DECODERS[decoder]
    program = projecting(toy, project)
    config = replace(CONFIG, action=action)
    with_pass, without, result = with_and_without(toy, program, config)
    assert (result.matched, result.rewritten, result.rejected) == (2 * gathered, 2 * gathered, ())
    assert saved(toy, with_pass, without, aten.linear, aten.matmul) == 2 * fewer
    for call in {n.args[0] for d in with_pass.decisions for n in with_pass.fx_graph.nodes if _reads(n, d)}:
        assert len(call.users) == len(call.args[0]), "something is gathered that nothing reads"
    run_both(toy, program, config, with_pass, without)


def _reads(node, decision):
    """Whether `node` is a tensor that a compaction of `decision` returns."""
    source = node.args[0] if node.args else None
    return (
        isinstance(source, torch.fx.Node)
        and getattr(source.target, "overloadpacket", None) is reroute.compact_tokens
        and source.args[1] is decision.positions
    )


@pytest.mark.parametrize("decoder", ["parallel", "eager", "padded"])
def test_other_decoders(toy, exported, decoder):
    options = {
        "parallel": {"parallel": True},
        "eager": {"kv_heads": 2, "attend": toy.eager, "mask": toy.additive_mask},
        "padded": {"kv_heads": 2, "padding": True},
    }[decoder]
    _, program = exported(layers=3, **options)
    with_pass, without, result = with_and_without(toy, program, CONFIG)
    assert result.rewritten == saved(toy, with_pass, without) == 2
    run_both(toy, program, CONFIG, with_pass, without)


@pytest.mark.parametrize("action", ACTIONS)
def test_result_exports_again(toy, exported, action):
    _, program = exported(layers=3, kv_heads=2)
    config = replace(CONFIG, action=action, pool="image")
    graph, _ = edit(program, config, toy.passes(4), True)
    inputs = toy.make_prompt(config, (64, 60), ((40,), (10, 5)))
    other = toy.make_prompt(config, LENGTHS, IMAGES)
    toy.assert_exports_again(to_program(graph, program), inputs, other)


def assert_nothing_changes(program, *steps):
    graph, _ = run_passes(program, steps)
    before = graph.to_text()
    graph, result = ReuseKeys()(graph)
    assert graph.to_text() == before
    assert (result.matched, result.rewritten) == (0, 0)
    return result


class Change(Pass):
    """Changes what the products with layer 1's key weight read: the first scores, the second runs in the layer."""

    def __init__(self, toy, which, target=None, *more, weight=None):
        self.toy, self.which, self.target, self.more, self.weight = toy, which, target, more, weight

    def apply(self, graph):
        products = products_with(self.toy, graph, "p_layers_1_key_weight")
        assert len(products) == 2
        for product in (products[i] for i in self.which):
            rows, weight, *bias = product.args
            if self.target:
                with graph.fx_graph.inserting_before(product):
                    changed = graph.fx_graph.call_function(self.target, (rows, *self.more))
                changed.meta, rows = dict(rows.meta), changed
            if self.weight:
                weight = next(n for n in graph.fx_graph.nodes if n.name == self.weight)
            product.args = (rows, weight, *bias)
        return PassResult(self.name)


@pytest.mark.parametrize("action", ACTIONS)
def test_the_same_call_on_both_sides_is_no_obstacle(toy, exported, action):
    _, program = exported(layers=2, kv_heads=2)
    config = replace(ONE_DECISION, action=action)
    change = Change(toy, (0, 1), aten.mul.Tensor, 0.5)
    with_pass, without, result = with_and_without(toy, program, config, change)
    assert result.rewritten == saved(toy, with_pass, without) == 1
    run_both(toy, program, config, with_pass, without)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(
    "change",
    [
        ((0,), aten.mul.Tensor, 0.5),
        ((1,), aten.mul.Tensor, 0.5),
        ((0, 1), aten.cumsum.default, 1),
        ((0, 1), aten.flip.default, [1]),
        ((0, 1), aten.softmax.int, 1),
        ((0, 1), aten.rand_like.default),
    ],
    ids=["scores from others", "keys from others", "running sum", "reversal", "softmax", "random"],
)
def test_keys_that_are_no_rows_of_the_scoring_keys(toy, exported, action, change):
    _, program = exported(layers=2, kv_heads=2)
    steps = [*toy.passes(4), *routing(replace(ONE_DECISION, action=action)), Change(toy, *change)]
    result = assert_nothing_changes(program, *steps)
    (miss,) = result.rejected
    assert "it has the weights of %linear_default" in miss.reason
    assert "does not read rows of what that one reads" in miss.reason


@pytest.mark.parametrize("which", [0, 1])
def test_other_weights(toy, exported, which):
    _, program = exported(layers=2, kv_heads=2)
    change = Change(toy, (which,), weight="p_layers_0_key_weight")
    assert assert_nothing_changes(program, *toy.passes(4), *routing(ONE_DECISION), change).rejected == ()


def flattened(layer, normed):
    batch, length, width = normed.shape
    key = torch.addmm(layer.key.bias, normed.reshape(-1, width), layer.key.weight.t())
    return layer.query(normed), key.view(batch, length, -1), layer.value(normed)


def test_rows_without_a_batch_dimension_stay(toy):
    """``[B * S, d]`` can't be compacted."""
    result = assert_nothing_changes(projecting(toy, flattened), *toy.passes(4), *routing(CONFIG))
    assert len(result.rejected) == 2
    assert all("has a layout that can't be compacted" in miss.reason for miss in result.rejected)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("pool", ["row", "image"])
def test_golden_models(toy, family, request, action, pool):
    captured = capture_decoder(request.getfixturevalue(family).model)
    config = RoutingConfig((2, 7, 15), (0.5, 0.3, 0.1), action, pool=pool)
    graphs = [edit(captured.program, config, find_passes(captured.num_layers), on) for on in (True, False)]
    (with_pass, result), (without, _) = graphs
    assert (result.matched, result.rewritten, result.rejected) == (3, 3, ())
    assert saved(toy, with_pass, without) == 3
    for layer in config.decision_layers:
        (product,) = products_with(toy, with_pass, f"p_layers_{layer}_self_attn_k_proj_weight")
        assert product.meta["region"] == f"decision.{layer}"
        assert len(product.args) == (3 if family == "qwen" else 2)  # with a bias or none
    programs = [to_program(graph, captured.program) for graph in (with_pass, without)]
    inputs = decoder_inputs(captured, config, batch=2)
    results = [toy.call(program, inputs) for program in programs]
    for returned in results:
        returned["output"] = returned["output"].last_hidden_state
    assert_same(*results, inputs, config)
    distinct = [share_regions(p.graph_module, lambda region: region.forward).distinct for p in programs]
    assert distinct[0] == distinct[1] + 1  # the first layer of a stage
