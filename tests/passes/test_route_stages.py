"""RouteStages against a plain loop over rows and layers that shares no code with the project."""

from dataclasses import dataclass, field, replace
from itertools import chain

import pytest
import torch
from suite_tiers import one, pairs, singles

from reroute_fx import RoutingConfig, route
from reroute_fx.passes import ACTIONS, InsertSelection, MatchError, RouteStages, run_passes
from reroute_fx.pipeline import unrouted
from reroute_fx.selection.row_plan import plan_rows

aten = torch.ops.aten
reroute = torch.ops.reroute
ROUTING_ACTIONS = ("compact_route", "compact_route_stagewise")
LENGTH, TOKENS = 64, 40
ONE_DECISION = RoutingConfig((1,), (0.4,))
TWO_DECISIONS = RoutingConfig((1, 2), (0.5, 0.3))
LAYOUT = r"%\w+ of shape \[.*\] .*layout that can't be compacted"
NUMBERED = r"%arange_\d: in layer [01] it numbers the tokens \(aten\.arange\."


@dataclass(frozen=True)
class Prompt:
    """What rows of a batch are made of.

    Attributes:
        lengths: tokens of each row.
        images: for each row the visual tokens of each image.
        places: places of the batch; the longest row if None.
    """

    lengths: tuple[int, ...]
    images: tuple[tuple[int, ...], ...]
    places: int | None = None


def even(batch=2, length=LENGTH, tokens=TOKENS):
    return Prompt((length,) * batch, ((tokens,),) * batch)


UNEVEN = {
    "lengths": Prompt((23, 30, 17), ((12,), (12,), (12,))),
    "visual tokens": Prompt((30, 30, 30), ((3,), (21,), (28,))),
    "both": Prompt((9, 30, 22), ((7,), (10,), (16,))),
    "text only": Prompt((30, 23, 1), ((), (15,), ()), places=33),
    "all text": Prompt((12, 5), ((), ()), places=14),
    "images": Prompt((30, 26, 12), ((5, 11, 1), (20,), (4, 4)), places=31),
    "images and text": Prompt((14, 40, 28), ((), (3, 0, 17, 9), (1, 1, 1))),
}


@dataclass
class Row:
    """What the loop finds for one sequence.

    Attributes:
        named: results as `route` names them, without padding.
        kept: rows of the sequence that each decision keeps.
        frozen: value with which each row left for good or for the time being.
    """

    named: dict = field(default_factory=dict)
    kept: dict = field(default_factory=dict)
    frozen: dict = field(default_factory=dict)


def scores_by_hand(toy, layer, rows, angles):
    """Attention of the last of `rows` on all of them, mean over heads."""
    normed = toy.normalised(rows, layer.input_norm)
    query = toy.turned(toy.heads_of(normed[-1:], layer.query), angles[-1:])[0]
    key = toy.turned(toy.heads_of(normed, layer.key), angles)
    group = query.shape[0] // key.shape[1]
    scale = toy.HEAD_DIM**-0.5
    heads = [(key[:, h // group] @ query[h] * scale).softmax(0) for h in range(query.shape[0])]
    return torch.stack(heads).mean(0)


def best_of(pool, scores, keep):
    """The `keep` tokens of `pool` with the highest scores."""
    return sorted(pool, key=lambda token: -scores[token])[:keep]


def sequence_by_hand(toy, model, embeds, positions, images, config):
    """Route one sequence: rows are numbered 0..S-1 throughout, and a row that does not run is not touched.

    `images` has the rows of each image.
    """
    found = Row()
    deletes = config.action == "physical_delete"
    ratios = dict(zip(config.decision_layers, config.keep_ratios, strict=True))
    stream, angles = embeds.clone(), positions[:, None] * model.frequencies
    visual = [*chain(*images)]
    everything = list(range(len(embeds)))
    text = [row for row in everything if row not in visual]
    pools = images if config.pool == "image" else [visual]
    active, candidates = everything, set(visual)
    for index, layer in enumerate(model.layers):
        if index in ratios:
            seen = active if deletes else everything
            attention = scores_by_hand(toy, layer, stream[seen], angles[seen])
            scores = dict(zip(seen, attention.tolist(), strict=True))
            kept = []
            for pool in pools:
                keep = max(1, int(len(pool) * ratios[index])) if pool else 0
                kept += best_of([token for token in pool if token in candidates], scores, keep)
            kept.sort()
            of_visual = [scores[token] if token in candidates else -torch.inf for token in visual]
            found.named[f"scores.{index}"] = torch.tensor(of_visual, dtype=stream.dtype)
            found.named[f"kept.{index}"] = torch.tensor([token in kept for token in visual], dtype=torch.bool)
            found.kept[index] = kept
            leaving = set(active) - set(text) - set(kept)
            found.frozen |= {row: stream[row].clone() for row in leaving}
            active = sorted(text + kept)
            candidates = set(kept) if deletes else candidates
        stream[active], key, value = toy.layer_by_hand(layer, stream[active], angles[active])
        found.named[f"key.{index}"], found.named[f"value.{index}"] = (
            key.transpose(0, 1),
            value.transpose(0, 1),
        )
    found.named["output"] = toy.normalised(stream, model.norm)
    return found


def batch_by_hand(toy, model, inputs, prompt, config):
    """Each row alone, without its padding."""
    images = toy.make_visual(prompt.lengths, prompt.images)
    embeds, positions = inputs["inputs_embeds"], inputs["position_ids"]
    with torch.no_grad():
        return [
            sequence_by_hand(toy, model, embeds[row, :length], positions[row, :length], images[row], config)
            for row, length in enumerate(prompt.lengths)
        ]


@pytest.fixture(scope="module")
def by_hand(toy):
    """A function ``(model, inputs, prompt, config) -> (rows, tolerances)``, each computed once."""
    cache = {}

    def expect(model, inputs, prompt, config):
        if config.action != "physical_delete":
            config = replace(config, action="compact_route")
        key = (model, prompt, config)
        if key not in cache:
            exact = batch_by_hand(toy, toy.double(model), toy.in_double(inputs), prompt, config)
            rounded = batch_by_hand(toy, model, inputs, prompt, config)
            assert [row.kept for row in rounded] == [row.kept for row in exact]
            cache[key] = exact, tolerances_of(toy, rounded, exact)
        return cache[key]

    return expect


def tolerances_of(toy, rounded, exact):
    """For each result that is a floating-point number, from its values in all rows."""
    found = {}
    for name in exact[0].named:
        if not name.startswith("kept"):
            pair = (torch.cat([row.named[name].flatten() for row in rows]) for rows in (rounded, exact))
            a, b = (values[values.isfinite()] for values in pair)
            found[name] = toy.tolerance(a, b) if len(b) else 0.0
    return found


@pytest.fixture(scope="module")
def routed(exported):
    """A function ``(config, action, **options) -> (model, exported, routed program)``, each made once."""
    cache = {}

    def get(config, action, layers=3, **options):
        model, program = exported(layers=layers, **options)
        config = replace(config, action=action)
        if (program, config) not in cache:
            cache[program, config] = route(program, config)[0]
        return model, program, cache[program, config]

    return get


def make_inputs(toy, config, prompt, **options):
    return toy.make_prompt(config, prompt.lengths, prompt.images, prompt.places, **options)


def flat(result):
    return {"output": result["output"]} | result["routing"]


def token_dim(name):
    """The dimension of one row's result that runs over its tokens."""
    return 1 if name.startswith(("key", "value")) else 0


def without_padding(result, row, expected):
    """Results of one row, as long as those that are expected for it."""
    return {
        name: tensor[row].narrow(token_dim(name), 0, expected[name].shape[token_dim(name)])
        for name, tensor in flat(result).items()
    }


def assert_expected(result, rows, tolerances):
    """What is kept is equal, everything else is, up to rounding. What is no visual token is never kept."""
    named = flat(result)
    assert named.keys() == rows[0].named.keys()
    first = min(rows[0].kept)
    for name, tensor in named.items():
        sizes = [row.named[name].shape[token_dim(name)] for row in rows]
        kind, _, layer = name.partition(".")
        if kind in ("key", "value"):
            assert tensor.shape[2] == (max(sizes) if int(layer) >= first else named["output"].shape[1]), name
        if kind in ("scores", "kept"):
            assert tensor.shape == (len(rows), max(1, *sizes)), name
            nothing = False if kind == "kept" else -torch.inf
            assert all((tensor[row, size:] == nothing).all() for row, size in enumerate(sizes)), name
    for number, row in enumerate(rows):
        given = without_padding(result, number, row.named)
        for name, exact in row.named.items():
            if name.startswith("kept"):
                assert torch.equal(given[name], exact), name
            else:
                torch.testing.assert_close(given[name].double(), exact, rtol=0, atol=tolerances[name])


def check(toy, routed, by_hand, config, action, prompt, **options):
    """Route `prompt` and compare with the loop."""
    model, _, program = routed(config, action, **options)
    inputs = make_inputs(toy, config, prompt, padding=options.get("padding", False))
    result = toy.call(program, inputs)
    rows, tolerances = by_hand(model, inputs, prompt, replace(config, action=action))
    assert_expected(result, rows, tolerances)
    return result


@one("2 s each; uneven rows are in the gate")
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("config", [ONE_DECISION, TWO_DECISIONS], ids=["one", "two"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_against_the_loop(toy, routed, by_hand, action, config, batch, kv_heads):
    result = check(toy, routed, by_hand, config, action, even(batch), kv_heads=kv_heads)
    assert result["routing"]["scores.1"].dtype == torch.float32


@one("half a second each; batches of models are in the gate")
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("pool", ["row", "image"])
@pytest.mark.parametrize("case", UNEVEN)
def test_uneven_rows_against_the_loop(toy, routed, by_hand, action, pool, case):
    config = replace(TWO_DECISIONS, pool=pool)
    check(toy, routed, by_hand, config, action, UNEVEN[case], kv_heads=2)


@one("2 s each; the gate has the plain decoder in each way")
@pytest.mark.parametrize("action", ["physical_delete", "compact_route_stagewise"])
@pytest.mark.parametrize("decoder", ["parallel", "eager", "padded"])
def test_other_decoders_against_the_loop(toy, routed, by_hand, action, decoder):
    options = {
        "parallel": {"parallel": True},
        "eager": {"kv_heads": 2, "attend": toy.eager, "mask": toy.additive_mask},
        "padded": {"kv_heads": 2, "padding": True},
    }[decoder]
    check(toy, routed, by_hand, TWO_DECISIONS, action, UNEVEN["both"], **options)


@pairs("each runs a program and loops over its tokens")
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(("length", "tokens"), [(3, 1), (12, 10), (50, 2)])
def test_extreme_numbers_of_visual_tokens(toy, routed, by_hand, action, length, tokens):
    check(toy, routed, by_hand, TWO_DECISIONS, action, even(2, length, tokens), kv_heads=2)


def test_cases_are_worth_testing(toy, exported, by_hand):
    """Rows differ in what they keep, and routing brings tokens back that were deferred before."""
    model, _ = exported(layers=3, kv_heads=2)
    prompt = even()
    inputs = make_inputs(toy, TWO_DECISIONS, prompt)
    routed_rows, _ = by_hand(model, inputs, prompt, TWO_DECISIONS)
    deleted_rows, _ = by_hand(model, inputs, prompt, replace(TWO_DECISIONS, action="physical_delete"))
    for rows in (routed_rows, deleted_rows):
        assert all(rows[0].kept[index] != rows[1].kept[index] for index in (1, 2))
    assert all(set(row.kept[2]) - set(row.kept[1]) for row in routed_rows)
    assert all(set(row.kept[2]) < set(row.kept[1]) for row in deleted_rows)
    spread = inputs["visual_index"].diff(dim=1)
    assert (spread > 1).any(dim=1).all()


def test_images_are_worth_testing(toy, exported, by_hand):
    """Competing within images keeps other tokens than competing within the row."""
    model, _ = exported(layers=3, kv_heads=2)
    prompt = UNEVEN["images"]
    inputs = make_inputs(toy, TWO_DECISIONS, prompt)
    of_row, of_image = (
        by_hand(model, inputs, prompt, replace(TWO_DECISIONS, pool=pool))[0] for pool in ("row", "image")
    )
    assert all(of_row[0].kept[index] != of_image[0].kept[index] for index in (1, 2))
    assert of_row[1].kept == of_image[1].kept


@one("half a second each")
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("case", ["both", "text only", "images"])
def test_padding_changes_nothing(toy, routed, by_hand, action, case):
    """Rows are equal whatever lies behind them, and whatever stands for no token."""
    config, prompt = replace(TWO_DECISIONS, pool="image"), UNEVEN[case]
    model, _, program = routed(config, action, kv_heads=2)
    inputs, other = (make_inputs(toy, config, prompt, garbage=garbage) for garbage in (5, 1000))
    behind = ~torch.isclose(inputs["inputs_embeds"], other["inputs_embeds"]).all(-1)
    assert torch.equal(behind.logical_not().sum(1), torch.tensor(prompt.lengths))
    is_token = other["visual_index"] < other["lengths"][:, None]
    rows, _ = by_hand(model, inputs, prompt, replace(config, action=action))
    for no_token in (other["lengths"][:, None], torch.tensor(2**63 - 1)):
        other["visual_index"] = other["visual_index"].where(is_token, no_token)
        first, second = (toy.call(program, given) for given in (inputs, other))
        for number, row in enumerate(rows):
            given, wanted = (without_padding(result, number, row.named) for result in (second, first))
            assert all(torch.equal(given[name], wanted[name]) for name in row.named)


@pytest.mark.parametrize("action", ACTIONS)
def test_more_places_than_a_stage_needs(toy, routed, by_hand, action):
    prompt = UNEVEN["both"]
    model, _, program = routed(TWO_DECISIONS, action, kv_heads=2)
    inputs = make_inputs(toy, TWO_DECISIONS, prompt)
    places = {1: len(inputs["slots_1"]) + 5, 2: len(inputs["slots_2"]) + 2}
    result = toy.call(program, inputs | {f"slots_{i}": torch.zeros(n).bool() for i, n in places.items()})
    rows, tolerances = by_hand(model, inputs, prompt, replace(TWO_DECISIONS, action=action))
    for index, count in places.items():
        for name in (f"key.{index}", f"value.{index}"):
            spare = count - max(row.named[name].shape[1] for row in rows)
            assert spare in (2, 5)
            assert result["routing"][name].shape[2] == count
            result["routing"][name] = result["routing"][name][:, :, :-spare]
    assert_expected(result, rows, tolerances)


@singles("each routes twice")
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("config", [ONE_DECISION, TWO_DECISIONS], ids=["one", "two"])
@pytest.mark.parametrize("prompt", [even(), UNEVEN["both"]], ids=["even", "uneven"])
def test_stagewise_routing_equals_routing_layer_by_layer(toy, routed, by_hand, config, kv_heads, prompt):
    inputs = make_inputs(toy, config, prompt)
    model, _, program = routed(config, "compact_route", kv_heads=kv_heads)
    _, _, stagewise = routed(config, "compact_route_stagewise", kv_heads=kv_heads)
    rows, _ = by_hand(model, inputs, prompt, config)
    results = toy.call(program, inputs), toy.call(stagewise, inputs)
    for number, row in enumerate(rows):
        one, other = (without_padding(result, number, row.named) for result in results)
        assert all(torch.equal(one[name], other[name]) for name in row.named)


@one("1 s each")
@pytest.mark.parametrize("action", ACTIONS)
def test_keeping_everything_equals_no_routing(toy, routed, action):
    config = RoutingConfig((1, 2), (1.0, 1.0))
    _, program, everything = routed(config, action, kv_heads=2)
    inputs = make_inputs(toy, config, even())
    result, plain = (flat(toy.call(p, inputs)) for p in (everything, unrouted(program)))
    assert set(result) - set(plain) == {"scores.1", "kept.1", "scores.2", "kept.2"}
    for name in plain:
        assert torch.equal(result[name], plain[name]), name
    for index in (1, 2):
        assert result[f"kept.{index}"].shape == (2, TOKENS)
        assert result[f"kept.{index}"].all()


@pytest.mark.parametrize("action", ROUTING_ACTIONS)
def test_one_decision_equals_deletion(toy, routed, action):
    inputs = make_inputs(toy, ONE_DECISION, UNEVEN["both"])
    deleted = flat(toy.call(routed(ONE_DECISION, "physical_delete", kv_heads=2)[2], inputs))
    kept = flat(toy.call(routed(ONE_DECISION, action, kv_heads=2)[2], inputs))
    assert kept.keys() == deleted.keys()
    for name in kept:
        # Two layers run: where no row is, only one of them starts from zeros when routing layer by layer.
        if name not in {"key.2", "value.2"}:
            assert torch.equal(kept[name], deleted[name]), name


@pytest.mark.parametrize("action", ACTIONS)
def test_rows_that_left_keep_their_residual_value(toy, routed, by_hand, action):
    """Their output is the final norm of what entered the layer before which they left."""
    model, _, program = routed(ONE_DECISION, action, kv_heads=2)
    prompt = even()
    inputs = make_inputs(toy, ONE_DECISION, prompt)
    result = toy.call(program, inputs)["output"]
    rows, tolerances = by_hand(model, inputs, prompt, replace(ONE_DECISION, action=action))
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
def test_rows_of_a_batch_are_independent(toy, routed, by_hand, action):
    """A sequence gets the same alone and beside others."""
    model, _, program = routed(TWO_DECISIONS, action, kv_heads=2)
    prompt = UNEVEN["both"]
    inputs = make_inputs(toy, TWO_DECISIONS, prompt)
    together = toy.call(program, inputs)
    rows, _ = by_hand(model, inputs, prompt, replace(TWO_DECISIONS, action=action))
    images = toy.make_visual(prompt.lengths, prompt.images)
    for row, length in enumerate(prompt.lengths):
        is_visual = torch.zeros(1, length, dtype=torch.bool)
        is_visual[0, [*chain(*images[row])]] = True
        alone = {name: inputs[name][row : row + 1, :length] for name in ("inputs_embeds", "position_ids")}
        alone |= plan_rows(TWO_DECISIONS, is_visual, [length], [prompt.images[row]]).inputs
        result = flat(toy.call(program, alone))
        for name, tensor in without_padding(together, row, rows[row].named).items():
            torch.testing.assert_close(tensor, result[name][0], rtol=1e-5, atol=1e-5)


@one("1 s each")
@pytest.mark.parametrize(
    ("action", "stages"), [("compact_route", 2), ("compact_route_stagewise", 1), ("physical_delete", 1)]
)
def test_operators_of_each_action(toy, exported, action, stages):
    _, program = exported(layers=3, kv_heads=2)
    steps = [*toy.passes(4), InsertSelection((1,))]
    before, _ = run_passes(program, steps)
    graph, results = run_passes(program, [*steps, RouteStages(action)])
    gathered = len(toy.operators(before.fx_graph, reroute.compact_tokens))
    assert toy.operators(before.fx_graph, reroute.restore_tokens) == []
    assert len(toy.operators(graph.fx_graph, reroute.compact_tokens)) == gathered + stages
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


@one("4 s each")
@pytest.mark.parametrize(
    ("action", "config"),
    [
        ("compact_route", ONE_DECISION),
        ("compact_route_stagewise", ONE_DECISION),
        ("physical_delete", replace(TWO_DECISIONS, pool="image")),
    ],
)
def test_result_exports_again(toy, routed, action, config):
    _, _, program = routed(config, action, layers=1 + len(config.decision_layers), kv_heads=2)
    inputs, other = (make_inputs(toy, config, prompt) for prompt in (even(), UNEVEN["images"]))
    toy.assert_exports_again(program, inputs, other)


def two_rotaries(decoder, hidden, cos, sin, mask):
    """Layers 2 and 3 read another cos and sin than the layers of the first stage."""
    local = cos.clone(), sin.clone()
    for index, layer in enumerate(decoder.layers):
        hidden = layer(hidden, *(local if index > 1 else (cos, sin)), mask)
    return hidden


@one("2 s each")
@pytest.mark.parametrize("action", ACTIONS)
def test_rotary_positions_of_later_layers(toy, routed, by_hand, action):
    check(toy, routed, by_hand, TWO_DECISIONS, action, UNEVEN["lengths"], layers=4, run=two_rotaries)


def test_last_residual_value_as_a_second_output(toy, by_hand):
    """What the last layer returns may be read by more than the final norm."""

    class ReturnsTwo(toy.Decoder):
        def forward(self, inputs_embeds, position_ids):
            cos, sin = self.turn(self, position_ids)
            hidden = self.run(self, inputs_embeds, cos, sin, self.mask(None, inputs_embeds))
            return {"normed": self.norm(hidden), "hidden": hidden}

    model = ReturnsTwo()
    config = replace(ONE_DECISION, action="compact_route")
    program, _ = route(toy.export(model), config)
    prompt = UNEVEN["both"]
    inputs = make_inputs(toy, config, prompt)
    result = toy.call(program, inputs)
    assert set(result["output"]) == {"normed", "hidden"}
    with torch.no_grad():
        assert torch.equal(model.norm(result["output"]["hidden"]), result["output"]["normed"])
    rows, tolerances = by_hand(model, inputs, prompt, config)
    assert_expected(result | {"output": result["output"]["normed"]}, rows, tolerances)


def counted_with_a_batch_of_one(toy):
    def turn(decoder, position_ids):
        return toy.rotary(decoder, torch.arange(position_ids.shape[1])[None])

    return turn


@one("2 s each")
@pytest.mark.parametrize("action", ACTIONS)
def test_positions_with_a_batch_of_one(toy, by_hand, action):
    """Cos and sin are ``[1, S, D]``, but the rows of the batch keep different tokens."""
    model = toy.Decoder(turn=counted_with_a_batch_of_one(toy))
    config = replace(ONE_DECISION, action=action)
    program, _ = route(toy.export(model), config)
    prompt = UNEVEN["both"]
    inputs = make_inputs(toy, config, prompt)
    inputs["position_ids"] = torch.arange(30).expand(3, -1).contiguous()
    rows, tolerances = by_hand(model, inputs, prompt, config)
    assert_expected(toy.call(program, inputs), rows, tolerances)


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


@one("2 s each")
@pytest.mark.parametrize(
    "run",
    [BIAS_AFTER, *map(layer_by_layer, (bias_before, bias_counted_from_one, rotary_of_its_own))],
    ids=["after", "before", "from one", "rotary"],
)
def test_positions_counted_inside_a_layer_are_refused(exported, run):
    """On compact rows the layer would count 0..S'-1: the place of every row would change."""
    _, program = exported(run=run)
    with pytest.raises(MatchError, match=NUMBERED):
        route(program, RoutingConfig((1,), (0.5,)))


def shared_bias(decoder, hidden, cos, sin, mask):
    bias = bias_of(decoder, torch.arange(hidden.shape[1]))
    for layer in decoder.layers:
        hidden = layer(hidden, cos, sin, mask) + bias
    return hidden


@one("half a second each")
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(
    ("run", "message"), [(BIAS_AFTER, NUMBERED), (shared_bias, LAYOUT)], ids=["inside", "shared"]
)
def test_bias_by_place_is_refused_by_every_action(exported, action, run, message):
    _, program = exported(run=run)
    with pytest.raises(MatchError, match=message):
        route(program, RoutingConfig((1,), (0.5,), action))
