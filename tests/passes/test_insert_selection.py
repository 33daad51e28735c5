"""InsertSelection: decisions score with the decision layer's own query and keys, and change nothing else."""

from itertools import chain

import pytest
import torch
from suite_tiers import one

from reroute_fx import RoutingConfig
from reroute_fx.passes import ExposeOutputs, InsertSelection, MatchError, RouteStages, run_passes, to_program
from reroute_fx.selection.asked_inputs import text_index

aten = torch.ops.aten
reroute = torch.ops.reroute
CONFIG = RoutingConfig((1, 2), (0.5, 0.25))
UNEVEN = {"lengths": (40, 31, 18), "images": ((21,), (20,), ())}


def select(toy, program, layers, *more, several_pools=False):
    steps = [*toy.passes(4), InsertSelection(layers, several_pools), *more]
    graph, results = run_passes(program, steps)
    return graph, results[4]


def layer_input(model, inputs, index):
    """Residual stream that enters a layer of the eager module."""
    seen = []
    handle = model.layers[index].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen[0]


def attention_of_last_token(toy, model, inputs, index, lengths):
    """Head mean of each row's last token's attention on the row's tokens, written out head by head."""
    layer, hidden = model.layers[index], layer_input(model, inputs, index)
    with torch.no_grad():
        normed = layer.input_norm(hidden)
        cos, sin = toy.rotary(model, inputs["position_ids"])
        query = toy.rotate(layer.split_heads(layer.query(normed)), cos, sin)
        key = toy.rotate(layer.split_heads(layer.key(normed)), cos, sin)
    group = toy.HEADS // layer.kv_heads
    rows = []
    for row, length in enumerate(lengths):
        heads = []
        for head in range(toy.HEADS):
            logits = key[row, head // group, :length] @ query[row, head, length - 1] / toy.HEAD_DIM**0.5
            heads.append(logits.softmax(-1))
        rows.append(torch.stack(heads).mean(0))
    return rows


def eager_inputs(inputs):
    return {name: inputs[name] for name in ("inputs_embeds", "position_ids")}


@one("3 s each")
@pytest.mark.parametrize(
    "options", [{}, {"kv_heads": 2}, {"parallel": True}], ids=["plain", "grouped", "parallel"]
)
def test_scores_and_selections(toy, exported, options):
    model, program = exported(layers=3, **options)
    graph, result = select(toy, program, CONFIG.decision_layers, ExposeOutputs())
    assert (result.matched, result.rewritten) == (2, 2)
    inputs = toy.make_prompt(CONFIG, **UNEVEN)
    routing = toy.call(to_program(graph, program), inputs)["routing"]
    plain, lengths, precise = eager_inputs(inputs), UNEVEN["lengths"], toy.double(model)
    visual = [[*chain(*images)] for images in toy.make_visual(**UNEVEN)]
    for index, keep in ((1, [10, 10, 0]), (2, [5, 5, 0])):
        rounded = attention_of_last_token(toy, model, plain, index, lengths)
        exact = attention_of_last_token(toy, precise, toy.in_double(plain), index, lengths)
        bound = toy.tolerance(torch.cat(rounded), torch.cat(exact))
        scores, kept = routing[f"scores.{index}"], routing[f"kept.{index}"]
        assert scores.dtype == torch.float32
        assert scores.shape == kept.shape == (3, 21)
        for row, tokens in enumerate(visual):
            wanted = exact[row][tokens]
            torch.testing.assert_close(scores[row, : len(tokens)].double(), wanted, rtol=0, atol=bound)
            assert (scores[row, len(tokens) :] == -torch.inf).all()
            best = wanted.topk(keep[row]).indices.sort().values
            assert torch.equal(kept[row].nonzero().flatten(), best)


def test_each_image_keeps_its_share(toy, exported):
    model, program = exported(layers=3, kv_heads=2)
    graph, _ = select(toy, program, (1,), ExposeOutputs(), several_pools=True)
    config = RoutingConfig((1,), (0.5,), pool="image")
    images = ((4, 11, 1), (), (3, 9))
    inputs = toy.make_prompt(config, UNEVEN["lengths"], images)
    kept = toy.call(to_program(graph, program), inputs)["routing"]["kept.1"]
    precise = toy.in_double(eager_inputs(inputs))
    attention = attention_of_last_token(toy, toy.double(model), precise, 1, UNEVEN["lengths"])
    for row, tokens in enumerate(toy.make_visual(UNEVEN["lengths"], images)):
        wanted = []
        for image in tokens:
            best = attention[row][image].topk(max(1, len(image) // 2)).indices.tolist()
            wanted += [image[place] for place in sorted(best)]
        of_row = inputs["visual_index"][row][kept[row]].tolist()
        assert of_row == wanted


def test_output_is_unchanged(toy, exported):
    _, program = exported(layers=3, kv_heads=2)
    graph, _ = select(toy, program, CONFIG.decision_layers)
    inputs = toy.make_prompt(CONFIG, **UNEVEN)
    unrouted, _ = run_passes(program, toy.passes(4))
    expected = toy.call(to_program(unrouted, program), inputs)["output"]
    assert torch.equal(toy.call(to_program(graph, program), inputs)["output"], expected)


def test_nodes_of_a_decision(toy, exported):
    _, program = exported(layers=3, kv_heads=2)
    before, _ = run_passes(program, toy.passes(4))
    graph, _ = select(toy, program, (1, 2))
    for operator, extra in ((reroute.visual_scores, 2), (reroute.select_tokens, 2), (aten.linear, 4)):
        added = len(toy.operators(graph.fx_graph, operator)) - len(toy.operators(before.fx_graph, operator))
        assert added == extra
    assert [decision.layer for decision in graph.decisions] == [1, 2]
    order = {node: place for place, node in enumerate(graph.fx_graph.nodes)}
    inputs = {node.name: node for node in graph.inputs}
    batch = graph.layers[0].start.meta["val"].shape[0]
    tokens = inputs["visual_index"].meta["val"].shape[1]
    for decision in graph.decisions:
        assert decision.visual_index is inputs["visual_index"]
        assert decision.lengths is inputs["lengths"]
        assert decision.scores.meta["val"].shape == (batch, tokens)
        assert decision.kept.meta["val"].shape == (batch, tokens)
        (slots,) = inputs[f"slots_{decision.layer}"].meta["val"].shape
        assert decision.positions.meta["val"].shape == (batch, slots)
        assert {node.meta["region"] for node in decision.nodes} == {f"decision.{decision.layer}"}
        assert {decision.scores, decision.positions, decision.kept} <= set(decision.nodes)
        layer = graph.layers[decision.layer]
        assert order[layer.start] < min(order[n] for n in decision.nodes)
        assert max(order[n] for n in decision.nodes) < order[layer.end]
        assert all(n not in layer.nodes for n in decision.nodes)


@pytest.mark.parametrize("several_pools", [False, True])
def test_added_inputs(toy, exported, several_pools):
    _, program = exported(layers=3, kv_heads=2)
    graph, _ = select(toy, program, (1, 2), several_pools=several_pools)
    batch = graph.layers[0].start.meta["val"].shape[0]
    added = {node.name: node.meta["val"] for node in graph.inputs[2:]}
    tokens = added["visual_index"].shape[1]
    by_token = ["pools"] if several_pools else []
    names = ["visual_index", "lengths", *by_token, "keep_1", "slots_1", "keep_2", "slots_2"]
    assert list(added) == names
    assert [node.name for node in graph.added_inputs] == names
    for name in ("visual_index", "keep_1", "keep_2", *by_token):
        assert added[name].shape == (batch, tokens)
    assert added["lengths"].shape == (batch,)
    sizes = {str(added[name].shape[-1]) for name in ("visual_index", "slots_1", "slots_2", "lengths")}
    assert len(sizes) == 4
    integers = {name for name in names if added[name].dtype == torch.int64}
    assert integers == {"visual_index", "lengths", *by_token}
    assert {added[name].dtype for name in set(names) - integers} == {torch.bool}


ASKED = {"lengths": (40, 31, 18), "images": ((11,), (9,), ())}


def by_text_values(candidates):
    """Mean over the text of products of values."""
    place = candidates.visual_index.clamp(max=candidates.hidden.shape[1] - 1)
    mine = candidates.values.gather(2, place[:, None, :, None].expand(-1, 2, -1, 8))
    is_text = (candidates.text_index < candidates.lengths[:, None]).float()
    products = (candidates.text_values @ mine.transpose(2, 3)).mean(dim=1)  # [B, T, N]
    return (products * is_text[:, :, None]).sum(dim=1) / is_text.sum(dim=1, keepdim=True)


def by_unrotated_query(candidates):
    """Products of the last query with keys, without rotary positions, further down later."""
    place = candidates.visual_index.clamp(max=candidates.hidden.shape[1] - 1)
    keys = candidates.unrotated_keys.gather(2, place[:, None, :, None].expand(-1, 2, -1, 8))
    query = candidates.unrotated_query[:, ::2]
    return (query @ keys.transpose(2, 3))[:, :, 0].mean(dim=1) - candidates.rows.float()


def insert(toy, program, ranks, scoring, *more):
    graph, _ = run_passes(program, [*toy.passes(4), InsertSelection((1, 2), False, ranks, scoring), *more])
    return graph


def test_rules_get_what_they_ask_for_and_nothing_else(toy, exported):
    _, program = exported(layers=3, kv_heads=2)
    graph = insert(toy, program, (by_text_values, by_unrotated_query), ("own", "previous"))
    names = [node.name for node in graph.added_inputs]
    assert names[6:] == ["text_index", "rows"]
    first, second = graph.decisions
    assert first.text_index is next(node for node in graph.added_inputs if node.name == "text_index")
    assert (second.text_index, second.scoring_layer) == (None, graph.layers[1])
    weights = [
        {n.args[1].name for n in decision.nodes if n.target is aten.linear.default}
        for decision in graph.decisions
    ]
    assert weights == [{"p_layers_1_value_weight"}, {"p_layers_1_query_weight", "p_layers_1_key_weight"}]
    # No rule asks: no inputs, no sizes, no tables of zeros.
    plain = insert(toy, program, (), ())
    assert len(plain.added_inputs) == 6
    assert "text_tokens" not in plain.new_sizes
    assert not toy.operators(plain.fx_graph, aten.zeros_like)


@one("5 s each")
@pytest.mark.parametrize("action", ["compact_route", "physical_delete"])
def test_what_rules_ask_for_is_right_in_each_stage(toy, exported, action):
    model, program = exported(layers=3, kv_heads=2)
    ranks, scoring = (by_unrotated_query, by_text_values), ("own", "own")
    graph = insert(toy, program, ranks, scoring, RouteStages(action), ExposeOutputs())
    routed = to_program(graph, program)
    inputs = with_text(toy, ASKED)
    routing = toy.call(routed, inputs)["routing"]
    hidden = layer_input(model, eager_inputs(inputs), 1)
    visual = [[*chain(*images)] for images in toy.make_visual(**ASKED)]
    for row, length in enumerate(ASKED["lengths"]):
        if not (tokens := visual[row]):
            continue
        positions, cells = inputs["position_ids"][row, :length], inputs["rows"][row]
        with torch.no_grad():
            normed = model.layers[1].input_norm(hidden[row, :length])
            query, key = (
                toy.heads_of(normed, linear) for linear in (model.layers[1].query, model.layers[1].key)
            )
            wanted = torch.einsum("hd,nhd->n", query[-1, ::2], key[tokens]) / 2 - cells[: len(tokens)]
        torch.testing.assert_close(routing["scores.1"][row, : len(tokens)], wanted, rtol=1e-4, atol=1e-4)
        kept = routing["kept.1"][row].nonzero().flatten().tolist()
        assert kept == wanted.topk(len(tokens) // 2).indices.sort().values.tolist()
        active = [i for i in range(length) if i not in tokens or tokens.index(i) in kept]
        angles = positions[active].unsqueeze(-1) * model.frequencies
        with torch.no_grad():
            stream = hidden[row, :length].clone()
            stream[active] = toy.layer_by_hand(model.layers[1], stream[active], angles)[0]
            values = toy.heads_of(toy.normalised(stream, model.layers[2].input_norm), model.layers[2].value)
        pool = kept if action == "physical_delete" else range(len(tokens))
        text = values[tokens[-1] + 1 :]
        wanted = torch.stack([(text * values[tokens[i]]).sum(-1).mean() for i in pool])
        found = routing["scores.2"][row]
        torch.testing.assert_close(found[list(pool)], wanted, rtol=1e-4, atol=1e-4)
        assert int(found.isfinite().sum()) == len(pool)
    other = with_text(toy, {"lengths": (21, 33), "images": ((9,), (12,))})
    toy.assert_exports_again(routed, inputs, other)


def with_text(toy, prompt):
    """Inputs of a prompt, with what rules ask for besides."""
    inputs = toy.make_prompt(CONFIG, **prompt)
    is_visual = torch.zeros(inputs["inputs_embeds"].shape[:2], dtype=torch.bool)
    for row, images in zip(is_visual, toy.make_visual(**prompt), strict=True):
        row[[*chain(*images)]] = True
    places = torch.arange(inputs["visual_index"].shape[1]).expand_as(inputs["visual_index"])
    return inputs | {
        "text_index": text_index(is_visual, prompt["lengths"]),
        "rows": (places * 7 % 5).contiguous(),
    }


def test_query_is_computed_for_the_last_token_only(toy, exported):
    _, program = exported(layers=3, kv_heads=2)
    graph, _ = select(toy, program, (1,))
    (decision,) = graph.decisions
    query, key = (decision.scores.args[i].meta["val"] for i in (0, 1))
    assert query.shape[1:] == (toy.HEADS, 1, toy.HEAD_DIM)
    assert key.shape[1] == 2
    length = graph.layers[0].start.meta["val"].shape[1]
    assert key.shape[2] == length
    projections = [n for n in decision.nodes if n.target is aten.linear.default]
    rows = {n.args[1].name: n.meta["val"].shape[1] for n in projections}
    assert rows == {"p_layers_1_query_weight": 1, "p_layers_1_key_weight": length}


@pytest.mark.parametrize(
    ("tokens", "ratio", "keep"), [(1, 0.1, 1), (7, 0.5, 3), (30, 0.1, 3), (10, 0.7, 7), (9, 1.0, 9)]
)
def test_number_of_kept_tokens(toy, exported, tokens, ratio, keep):
    """``max(1, int(N * ratio))``; the stage has as many places as that and the text."""
    _, program = exported(layers=3, kv_heads=2)
    graph, _ = select(toy, program, (1,), ExposeOutputs())
    inputs = toy.make_prompt(RoutingConfig((1,), (ratio,)), (40,), ((tokens,),))
    assert inputs["slots_1"].shape == (40 - tokens + keep,)
    routing = toy.call(to_program(graph, program), inputs)["routing"]
    assert routing["kept.1"].sum() == keep
    assert routing["scores.1"].shape == routing["kept.1"].shape == (1, tokens)


def test_result_exports_again(toy, exported):
    _, program = exported(kv_heads=2)
    config = RoutingConfig((1,), (0.5,), pool="image")
    graph, _ = select(toy, program, (1,), ExposeOutputs(), several_pools=True)
    inputs = toy.make_prompt(config, (64, 60), ((40,), (10, 5)))
    other = toy.make_prompt(config, (40, 11, 30), ((6, 7), (), (12,)))
    toy.assert_exports_again(to_program(graph, program), inputs, other)


def test_no_decisions_are_refused(toy, exported):
    _, program = exported(layers=3, kv_heads=2)
    with pytest.raises(MatchError, match="decision_layers is empty"):
        select(toy, program, ())


def test_layer_beyond_the_decoder_is_refused(toy, exported):
    _, program = exported(layers=3, kv_heads=2)
    with pytest.raises(
        MatchError, match=r"decision_layers has 3, but the graph has 3 layers; expected 1\.\.2"
    ):
        select(toy, program, (1, 3))


def counts_rows(decoder, position_ids):
    angles = torch.arange(position_ids.shape[1])[:, None] * decoder.frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def run_without_batch(decoder, hidden, cos, sin, mask):
    for layer in decoder.layers:
        hidden = layer(hidden, cos[None], sin[None], mask)
    return hidden


def test_rotary_positions_without_a_batch_are_refused(toy, exported):
    """Cos and sin of shape ``[S, D]`` run over the sequence, but say nothing of the batch."""
    _, program = exported(turn=counts_rows, run=run_without_batch)
    with pytest.raises(
        MatchError, match=r"%\w+ of shape \[.*\] runs over the sequence in a layout that can't be"
    ):
        select(toy, program, (1,))


def centred(normed):
    return normed - normed.mean(1, keepdim=True)


def accumulated(normed):
    return normed.cumsum(1)


@pytest.mark.parametrize(("mix", "name"), [(centred, "mean"), (accumulated, "cumsum")])
def test_query_that_depends_on_other_rows_is_refused(toy, mix, name):
    """From the last token alone the layer's query can't be computed."""

    def run(decoder, hidden, cos, sin, mask):
        for layer in decoder.layers:
            normed = mix(layer.input_norm(hidden))
            hidden = hidden + layer.attention(normed, normed, cos, sin, mask)
        return hidden

    program = toy.export(toy.Decoder(run=run))
    with pytest.raises(MatchError, match=rf"%{name}\w*"):
        select(toy, program, (1,))


def test_static_length_is_refused(toy):
    with torch.no_grad():
        program = torch.export.export(toy.Decoder(), (), toy.make_inputs())
    with pytest.raises(MatchError, match=r"%inputs_embeds .*(dynamic|symbolic)"):
        select(toy, program, (1,))
