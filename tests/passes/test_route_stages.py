"""RouteStages against a plain loop over rows and layers that shares no code with the project."""

import math
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F

from reroute_fx import RoutingConfig, route
from reroute_fx.passes import ACTIONS, InsertSelection, MatchError, RouteStages, run_passes, to_program
from reroute_fx.routing import unrouted

aten = torch.ops.aten
reroute = torch.ops.reroute
ROUTING_ACTIONS = ("compact_route", "compact_route_stagewise")
LENGTH, TOKENS = 64, 40
ONE_DECISION = {1: 0.4}
TWO_DECISIONS = {1: 0.5, 2: 0.3}
LAYOUT = r"%\w+ of shape \[.*\] .*layout that can't be compacted"


@dataclass
class Expected:
    """What the loop finds for one sequence."""

    output: torch.Tensor | None = None
    keys: list = field(default_factory=list)
    values: list = field(default_factory=list)
    scores: dict = field(default_factory=dict)
    selected: dict = field(default_factory=dict)
    kept: dict = field(default_factory=dict)
    frozen: dict = field(default_factory=dict)


def normalised(rows, norm):
    return rows / (rows.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


def turned(rows, angles):
    """Rotary embedding of ``[S, H, D]`` as a rotation of each pair (i, i + D/2)."""
    half = rows.shape[-1] // 2
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    low, high = rows[..., :half], rows[..., half:]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def heads_of(rows, linear):
    return F.linear(rows, linear.weight, linear.bias).view(rows.shape[0], -1, 8)


def layer_by_hand(layer, rows, angles):
    """One layer on the rows of one sequence, with its rotated keys and its values ``[S, H, D]``."""
    normed = normalised(rows, layer.input_norm)
    query, key = (turned(heads_of(normed, m), angles) for m in (layer.query, layer.key))
    value = heads_of(normed, layer.value)
    later = torch.ones(len(rows), len(rows), dtype=torch.bool).triu(1)
    mixed = torch.zeros_like(query)
    for head in range(query.shape[1]):
        shared = head // (query.shape[1] // key.shape[1])
        logits = query[:, head] @ key[:, shared].T / math.sqrt(8)
        mixed[:, head] = logits.masked_fill(later, -math.inf).softmax(-1) @ value[:, shared]
    attention = F.linear(mixed.flatten(1), layer.output.weight)
    source = normed if layer.parallel else normalised(rows + attention, layer.output_norm)
    gate, up = F.linear(source, layer.gate.weight), F.linear(source, layer.up.weight)
    return rows + attention + F.linear(gate * gate.sigmoid() * up, layer.down.weight), key, value


def scores_by_hand(layer, rows, angles):
    """Attention of the last of `rows` on all of them, mean over heads."""
    normed = normalised(rows, layer.input_norm)
    query = turned(heads_of(normed[-1:], layer.query), angles[-1:])[0]
    key = turned(heads_of(normed, layer.key), angles)
    group = query.shape[0] // key.shape[1]
    heads = [(key[:, h // group] @ query[h] / math.sqrt(8)).softmax(0) for h in range(query.shape[0])]
    return torch.stack(heads).mean(0)


def sequence_by_hand(model, embeds, positions, visual, decisions, deletes):
    """Route one sequence: rows are numbered 0..S-1 throughout, and a row that does not run is not touched."""
    found = Expected()
    stream, angles = embeds.clone(), positions[:, None] * model.frequencies
    everything = list(range(len(embeds)))
    text = [row for row in everything if row not in visual]
    active, pool = everything, visual
    for index, layer in enumerate(model.layers):
        if index in decisions:
            seen = active if deletes else everything
            attention = scores_by_hand(layer, stream[seen], angles[seen])
            scores = torch.stack([attention[seen.index(row)] for row in pool])
            keep = max(1, int(len(visual) * decisions[index]))
            selected = sorted(torch.topk(scores, keep).indices.tolist())
            kept = [pool[place] for place in selected]
            found.scores[index], found.selected[index], found.kept[index] = scores, selected, kept
            leaving = set(active) - set(text) - set(kept)
            found.frozen |= {row: stream[row].clone() for row in leaving}
            active = sorted(text + kept)
            pool = kept if deletes else visual
        new, key, value = layer_by_hand(layer, stream[active], angles[active])
        stream[active] = new
        found.keys.append(key.transpose(0, 1))
        found.values.append(value.transpose(0, 1))
    found.output = normalised(stream, model.norm)
    return found


def batch_by_hand(model, inputs, decisions, action):
    """Results of all sequences as `route` names them, and those of each sequence."""
    with torch.no_grad():
        rows = [
            sequence_by_hand(
                model, embeds, positions, visual.tolist(), decisions, action == "physical_delete"
            )
            for embeds, positions, visual in zip(
                inputs["inputs_embeds"], inputs["position_ids"], inputs["visual_index"], strict=True
            )
        ]
    named = {"output": torch.stack([row.output for row in rows])}
    for index in range(len(model.layers)):
        named[f"key.{index}"] = torch.stack([row.keys[index] for row in rows])
        named[f"value.{index}"] = torch.stack([row.values[index] for row in rows])
    for index in decisions:
        named[f"scores.{index}"] = torch.stack([row.scores[index] for row in rows])
        named[f"selected.{index}"] = torch.tensor([row.selected[index] for row in rows])
    return named, rows


@pytest.fixture(scope="module")
def by_hand(toy):
    """Expected results with the tolerance of each, computed once for each case."""
    cache = {}

    def expect(model, inputs, decisions, action):
        action = "physical_delete" if action == "physical_delete" else "route"
        key = (model, tuple(inputs["inputs_embeds"].shape), tuple(decisions.items()), action)
        if key not in cache:
            exact, rows = batch_by_hand(toy.double(model), toy.in_double(inputs), decisions, action)
            rounded, _ = batch_by_hand(model, inputs, decisions, action)
            assert all(torch.equal(rounded[f"selected.{i}"], exact[f"selected.{i}"]) for i in decisions)
            tolerances = {
                name: toy.tolerance(rounded[name], exact[name])
                for name in exact
                if not name.startswith("selected")
            }
            cache[key] = exact, tolerances, rows
        return cache[key]

    return expect


@pytest.fixture(scope="module")
def routed(exported):
    """A function ``(decisions, action, **options) -> (model, exported, routed program)``, each made once."""
    cache = {}

    def get(decisions, action, layers=3, **options):
        model, program = exported(layers=layers, **options)
        key = (program, tuple(decisions.items()), action)
        if key not in cache:
            config = RoutingConfig(tuple(decisions), tuple(decisions.values()), action)
            cache[key] = route(program, config)[0]
        return model, program, cache[key]

    return get


def make_inputs(toy, batch=2, length=LENGTH, tokens=TOKENS):
    return toy.make_inputs(batch, length) | {"visual_index": toy.make_visual_index(batch, length, tokens)}


def flat(result):
    return {"output": result["output"]} | result["routing"]


def assert_expected(result, expected, tolerances):
    """Selections are equal; everything else is, up to rounding."""
    result = flat(result)
    assert result.keys() == expected.keys()
    for name, exact in expected.items():
        assert result[name].shape == exact.shape, name
        if name.startswith("selected"):
            assert torch.equal(result[name], exact), name
        else:
            assert (result[name] - exact).abs().max().item() <= tolerances[name], name


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("decisions", [ONE_DECISION, TWO_DECISIONS], ids=["one", "two"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_against_the_loop(toy, routed, by_hand, action, decisions, batch, kv_heads):
    model, _, program = routed(decisions, action, kv_heads=kv_heads)
    inputs = make_inputs(toy, batch)
    expected, tolerances, _ = by_hand(model, inputs, decisions, action)
    result = toy.call(program, inputs)
    assert_expected(result, expected, tolerances)
    assert result["routing"]["scores.1"].dtype == torch.float32


@pytest.mark.parametrize("action", ["physical_delete", "compact_route_stagewise"])
@pytest.mark.parametrize("decoder", ["parallel", "eager", "padded"])
def test_other_decoders_against_the_loop(toy, routed, by_hand, action, decoder):
    options = {
        "parallel": {"parallel": True},
        "eager": {"kv_heads": 2, "attend": toy.eager, "mask": toy.additive_mask},
        "padded": {"kv_heads": 2, "padding": True},
    }[decoder]
    model, _, program = routed(TWO_DECISIONS, action, **options)
    inputs = make_inputs(toy, 2, 30, 17)
    expected, tolerances, _ = by_hand(model, inputs, TWO_DECISIONS, action)
    assert_expected(toy.call(program, inputs), expected, tolerances)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(("length", "tokens"), [(3, 1), (12, 10), (50, 2)])
def test_extreme_numbers_of_visual_tokens(toy, routed, by_hand, action, length, tokens):
    model, _, program = routed(TWO_DECISIONS, action, kv_heads=2)
    inputs = make_inputs(toy, 2, length, tokens)
    expected, tolerances, _ = by_hand(model, inputs, TWO_DECISIONS, action)
    assert_expected(toy.call(program, inputs), expected, tolerances)


def test_cases_are_worth_testing(toy, exported, by_hand):
    """Rows differ in what they keep, and routing brings tokens back that were deferred before."""
    model, _ = exported(layers=3, kv_heads=2)
    inputs = make_inputs(toy)
    _, _, routed_rows = by_hand(model, inputs, TWO_DECISIONS, "compact_route")
    _, _, deleted_rows = by_hand(model, inputs, TWO_DECISIONS, "physical_delete")
    for rows in (routed_rows, deleted_rows):
        assert all(rows[0].kept[index] != rows[1].kept[index] for index in TWO_DECISIONS)
    assert all(set(row.kept[2]) - set(row.kept[1]) for row in routed_rows)
    assert all(set(row.kept[2]) < set(row.kept[1]) for row in deleted_rows)
    spread = inputs["visual_index"].diff(dim=1)
    assert (spread > 1).any(dim=1).all()


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("decisions", [ONE_DECISION, TWO_DECISIONS], ids=["one", "two"])
def test_stagewise_routing_equals_routing_layer_by_layer(toy, routed, decisions, kv_heads):
    inputs = make_inputs(toy)
    layerwise, stagewise = (
        flat(toy.call(routed(decisions, action, kv_heads=kv_heads)[2], inputs)) for action in ROUTING_ACTIONS
    )
    assert layerwise.keys() == stagewise.keys()
    for name in layerwise:
        assert torch.equal(layerwise[name], stagewise[name]), name


@pytest.mark.parametrize("action", ACTIONS)
def test_keeping_everything_equals_no_routing(toy, routed, action):
    _, program, everything = routed({1: 1.0, 2: 1.0}, action, kv_heads=2)
    inputs = make_inputs(toy)
    result, plain = (flat(toy.call(p, inputs)) for p in (everything, unrouted(program)))
    assert set(result) - set(plain) == {"scores.1", "selected.1", "scores.2", "selected.2"}
    for name in plain:
        assert torch.equal(result[name], plain[name]), name
    for index in (1, 2):
        assert torch.equal(result[f"selected.{index}"], torch.arange(TOKENS).expand(2, -1))


@pytest.mark.parametrize("action", ROUTING_ACTIONS)
def test_one_decision_equals_deletion(toy, routed, action):
    inputs = make_inputs(toy)
    deleted = flat(toy.call(routed(ONE_DECISION, "physical_delete", kv_heads=2)[2], inputs))
    kept = flat(toy.call(routed(ONE_DECISION, action, kv_heads=2)[2], inputs))
    assert kept.keys() == deleted.keys()
    for name in kept:
        assert torch.equal(kept[name], deleted[name]), name


@pytest.mark.parametrize("action", ACTIONS)
def test_rows_that_left_keep_their_residual_value(toy, routed, by_hand, action):
    """Their output is the final norm of what entered the layer before which they left."""
    model, _, program = routed(ONE_DECISION, action, kv_heads=2)
    inputs = make_inputs(toy)
    result = toy.call(program, inputs)["output"]
    _, tolerances, rows = by_hand(model, inputs, ONE_DECISION, action)
    entered = []
    handle = model.layers[1].register_forward_pre_hook(lambda _, arguments: entered.append(arguments[0]))
    with torch.no_grad():
        model(inputs["inputs_embeds"], inputs["position_ids"])
        frozen = model.norm(entered[0])
    handle.remove()
    for row in range(2):
        left = sorted(rows[row].frozen)
        assert len(left) == TOKENS - 16
        assert sorted(left + rows[row].kept[1]) == inputs["visual_index"][row].tolist()
        assert (result[row, left] - frozen[row, left]).abs().max().item() <= tolerances["output"]
        ran = sorted(set(range(LENGTH)) - set(left))
        assert ((result[row, ran] - frozen[row, ran]).abs().amax(-1) > 10 * tolerances["output"]).all()


@pytest.mark.parametrize("action", ACTIONS)
def test_rows_of_a_batch_are_independent(toy, routed, action):
    """A sequence gets the same alone and beside another one."""
    _, _, program = routed(TWO_DECISIONS, action, kv_heads=2)
    inputs = make_inputs(toy)
    together = flat(toy.call(program, inputs))
    for row in range(2):
        alone = flat(toy.call(program, {name: tensor[row : row + 1] for name, tensor in inputs.items()}))
        for name in together:
            torch.testing.assert_close(together[name][row : row + 1], alone[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("action", "stages"), [("compact_route", 2), ("compact_route_stagewise", 1), ("physical_delete", 1)]
)
def test_operators_of_each_action(toy, exported, action, stages):
    _, program = exported(layers=3, kv_heads=2)
    steps = [*toy.passes(4), InsertSelection((1,), (0.4,))]
    before, _ = run_passes(program, steps)
    graph, results = run_passes(program, [*steps, RouteStages(action)])
    assert toy.operators(before.fx_graph, reroute.compact_tokens, reroute.restore_tokens) == []
    assert len(toy.operators(graph.fx_graph, reroute.compact_tokens)) == stages
    assert len(toy.operators(graph.fx_graph, reroute.restore_tokens)) == stages
    for operator in (reroute.visual_scores, reroute.select_tokens, aten.scaled_dot_product_attention):
        assert (
            len(toy.operators(graph.fx_graph, operator)) == len(toy.operators(before.fx_graph, operator)) > 0
        )
    attentions = toy.operators(graph.fx_graph, aten.scaled_dot_product_attention)
    rows = [str(node.args[0].meta["val"].shape[2]) for node in attentions]
    (decision,) = graph.decisions
    active = str(decision.positions.meta["val"].shape[1])
    assert rows == [str(graph.layers[0].start.meta["val"].shape[1]), active, active]
    assert (results[-1].matched, results[-1].rewritten, results[-1].detail) == (1, 2, action)


@pytest.mark.parametrize(
    ("action", "decisions"),
    [
        ("compact_route", ONE_DECISION),
        ("compact_route_stagewise", ONE_DECISION),
        ("physical_delete", TWO_DECISIONS),
    ],
)
def test_result_exports_again(toy, routed, action, decisions):
    _, _, program = routed(decisions, action, layers=1 + len(decisions), kv_heads=2)
    toy.assert_exports_again(program, make_inputs(toy), make_inputs(toy, 3, 40, 13))


def test_no_decisions_change_nothing(toy, exported):
    model, program = exported(layers=3, kv_heads=2)
    graph, results = run_passes(program, [*toy.passes(4), RouteStages("compact_route")])
    assert (results[-1].matched, results[-1].rewritten) == (0, 0)
    toy.assert_agrees(to_program(graph, program), model, toy.make_inputs())


def two_rotaries(decoder, hidden, cos, sin, mask):
    """Layers 2 and 3 read another cos and sin than the layers of the first stage."""
    local = cos.clone(), sin.clone()
    for index, layer in enumerate(decoder.layers):
        hidden = layer(hidden, *(local if index > 1 else (cos, sin)), mask)
    return hidden


@pytest.mark.parametrize("action", ACTIONS)
def test_rotary_positions_of_later_layers(toy, routed, by_hand, action):
    model, _, program = routed(TWO_DECISIONS, action, layers=4, run=two_rotaries)
    inputs = make_inputs(toy, 2, 30, 17)
    expected, tolerances, _ = by_hand(model, inputs, TWO_DECISIONS, action)
    assert_expected(toy.call(program, inputs), expected, tolerances)


def test_last_residual_value_as_a_second_output(toy, by_hand):
    """What the last layer returns may be read by more than the final norm."""

    class ReturnsTwo(toy.Decoder):
        def forward(self, inputs_embeds, position_ids):
            cos, sin = self.turn(self, position_ids)
            hidden = self.run(self, inputs_embeds, cos, sin, self.mask(None, inputs_embeds))
            return {"normed": self.norm(hidden), "hidden": hidden}

    model = ReturnsTwo()
    program, _ = route(toy.export(model), RoutingConfig((1,), (0.4,)))
    inputs = make_inputs(toy, 2, 30, 17)
    result = toy.call(program, inputs)
    assert set(result["output"]) == {"normed", "hidden"}
    with torch.no_grad():
        assert torch.equal(model.norm(result["output"]["hidden"]), result["output"]["normed"])
    expected, tolerances, _ = by_hand(model, inputs, ONE_DECISION, "compact_route")
    assert_expected(result | {"output": result["output"]["normed"]}, expected, tolerances)


def counted_with_a_batch_of_one(toy):
    def turn(decoder, position_ids):
        return toy.rotary(decoder, torch.arange(position_ids.shape[1])[None])

    return turn


@pytest.mark.parametrize("action", ACTIONS)
def test_positions_with_a_batch_of_one(toy, by_hand, action):
    """Cos and sin are ``[1, S, D]``, but the rows of the batch keep different tokens."""
    model = toy.Decoder(turn=counted_with_a_batch_of_one(toy))
    program, _ = route(toy.export(model), RoutingConfig((1,), (0.4,), action))
    inputs = make_inputs(toy, 2, 30, 17)
    inputs["position_ids"] = torch.arange(30).expand(2, -1).contiguous()
    expected, tolerances, _ = by_hand(model, inputs, ONE_DECISION, action)
    assert_expected(toy.call(program, inputs), expected, tolerances)


def test_positions_that_lose_their_batch_are_refused(toy):
    """Cos is ``[1, S, D]``, each layer reads ``cos[0]``: compact rows of one sequence would serve all."""

    def run(decoder, hidden, cos, sin, mask):
        cos, sin = cos[0], sin[0]
        for layer in decoder.layers:
            hidden = layer(hidden, cos[None], sin[None], mask)
        return hidden

    program = toy.export(toy.Decoder(turn=counted_with_a_batch_of_one(toy), run=run))
    with pytest.raises(MatchError, match=LAYOUT):
        route(program, RoutingConfig((1,), (0.4,)))


def bias_of(decoder, count):
    return count[:, None] * decoder.norm.weight


def bias_after(decoder, layer, hidden, cos, sin, mask):
    return layer(hidden, cos, sin, mask) + bias_of(decoder, torch.arange(hidden.shape[1]))


def bias_before(decoder, layer, hidden, cos, sin, mask):
    return layer(hidden + bias_of(decoder, torch.arange(hidden.shape[1])), cos, sin, mask)


def bias_counted_from_one(decoder, layer, hidden, cos, sin, mask):
    return layer(hidden, cos, sin, mask) + bias_of(decoder, torch.arange(1, hidden.shape[1] + 1))


def rotary_of_its_own(decoder, layer, hidden, cos, sin, mask):
    cos, sin = decoder.turn(decoder, torch.arange(hidden.shape[1])[None])
    return layer(hidden, cos, sin, mask)


def layer_by_layer(run_layer):
    def run(decoder, hidden, cos, sin, mask):
        for layer in decoder.layers:
            hidden = run_layer(decoder, layer, hidden, cos, sin, mask)
        return hidden

    return run


BIAS_AFTER = layer_by_layer(bias_after)


@pytest.mark.parametrize(
    "run",
    [BIAS_AFTER, *map(layer_by_layer, (bias_before, bias_counted_from_one, rotary_of_its_own))],
    ids=["after", "before", "from one", "rotary"],
)
def test_positions_counted_inside_a_layer_are_refused(exported, run):
    """On compact rows the layer would count 0..S'-1: the place of every row would change."""
    _, program = exported(run=run)
    with pytest.raises(MatchError, match=LAYOUT):
        route(program, RoutingConfig((1,), (0.5,)))


def shared_bias(decoder, hidden, cos, sin, mask):
    bias = bias_of(decoder, torch.arange(hidden.shape[1]))
    for layer in decoder.layers:
        hidden = layer(hidden, cos, sin, mask) + bias
    return hidden


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("run", [BIAS_AFTER, shared_bias], ids=["inside", "shared"])
def test_bias_by_place_is_refused_by_every_action(exported, action, run):
    _, program = exported(run=run)
    with pytest.raises(MatchError, match=LAYOUT):
        route(program, RoutingConfig((1,), (0.5,), action))
