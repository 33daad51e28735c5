"""InsertSelection: decisions score with the decision layer's own query and keys, and change nothing else."""

import pytest
import torch

from reroute_fx.passes import ExposeOutputs, InsertSelection, MatchError, run_passes, to_program

aten = torch.ops.aten
reroute = torch.ops.reroute


def select(toy, program, layers, ratios, *more):
    graph, results = run_passes(program, [*toy.passes(4), InsertSelection(layers, ratios), *more])
    return graph, results[4]


def layer_input(model, inputs, index):
    """Residual stream that enters a layer of the eager module."""
    seen = []
    handle = model.layers[index].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen[0]


def attention_of_last_row(toy, model, inputs, index):
    """Head mean of the last row's attention on every row, ``[B, S]``, written out head by head."""
    layer, hidden = model.layers[index], layer_input(model, inputs, index)
    with torch.no_grad():
        normed = layer.input_norm(hidden)
        cos, sin = toy.rotary(model, inputs["position_ids"])
        query = toy.rotate(layer.split_heads(layer.query(normed)), cos, sin)
        key = toy.rotate(layer.split_heads(layer.key(normed)), cos, sin)
    group = toy.HEADS // layer.kv_heads
    heads = []
    for head in range(toy.HEADS):
        logits = torch.einsum("bd,bsd->bs", query[:, head, -1], key[:, head // group]) / toy.HEAD_DIM**0.5
        heads.append(logits.softmax(-1))
    return torch.stack(heads).mean(0)


@pytest.mark.parametrize(
    "options", [{}, {"kv_heads": 2}, {"parallel": True}], ids=["plain", "grouped", "parallel"]
)
def test_scores_and_selections(toy, exported, options):
    model, program = exported(layers=3, **options)
    graph, result = select(toy, program, (1, 2), (0.5, 0.25), ExposeOutputs())
    assert (result.matched, result.rewritten) == (2, 2)
    inputs = toy.make_inputs(3, 40)
    inputs["visual_index"] = toy.make_visual_index(3, 40, 21)
    routing = toy.call(to_program(graph, program), inputs)["routing"]
    visual = inputs.pop("visual_index")
    precise = toy.double(model)
    for index, keep in ((1, 10), (2, 5)):
        rounded = attention_of_last_row(toy, model, inputs, index).gather(1, visual)
        exact = attention_of_last_row(toy, precise, toy.in_double(inputs), index).gather(1, visual)
        scores = routing[f"scores.{index}"]
        assert scores.dtype == torch.float32
        assert (scores - exact).abs().max().item() <= toy.tolerance(rounded, exact)
        best = exact.topk(keep, dim=1).indices.sort(dim=1).values
        assert torch.equal(routing[f"selected.{index}"], best)


def test_output_is_unchanged(toy, exported):
    _, program = exported(layers=3, kv_heads=2)
    graph, _ = select(toy, program, (1, 2), (0.5, 0.25))
    inputs = toy.make_inputs(3, 40)
    edited = to_program(graph, program)
    routed_inputs = inputs | {"visual_index": toy.make_visual_index(3, 40, 21)}
    unrouted, _ = run_passes(program, toy.passes(4))
    expected = toy.call(to_program(unrouted, program), inputs)["output"]
    assert torch.equal(toy.call(edited, routed_inputs)["output"], expected)


def test_nodes_of_a_decision(toy, exported):
    _, program = exported(layers=3, kv_heads=2)
    before, _ = run_passes(program, toy.passes(4))
    graph, _ = select(toy, program, (1, 2), (0.5, 0.25))
    for operator, extra in ((reroute.visual_scores, 2), (reroute.select_tokens, 2), (aten.linear, 4)):
        added = len(toy.operators(graph.fx_graph, operator)) - len(toy.operators(before.fx_graph, operator))
        assert added == extra
    assert [decision.layer for decision in graph.decisions] == [1, 2]
    order = {node: place for place, node in enumerate(graph.fx_graph.nodes)}
    batch, length = graph.layers[0].start.meta["val"].shape[:2]
    tokens = graph.visual_index.meta["val"].shape[1]
    for decision in graph.decisions:
        assert decision.pool is graph.visual_index
        assert decision.scores.meta["val"].shape == (batch, tokens)
        keep = decision.selected.meta["val"].shape[1]
        assert decision.positions.meta["val"].shape == (batch, length - tokens + keep)
        assert {node.meta["region"] for node in decision.nodes} == {f"decision.{decision.layer}"}
        assert {decision.scores, decision.positions, decision.selected} <= set(decision.nodes)
        layer = graph.layers[decision.layer]
        assert order[layer.start] < min(order[n] for n in decision.nodes)
        assert max(order[n] for n in decision.nodes) < order[layer.end]
        assert all(n not in layer.nodes for n in decision.nodes)
    assert graph.inputs[-1] is graph.visual_index
    assert graph.visual_index.meta["val"].dtype == torch.int64


def test_query_is_computed_for_the_last_row_only(toy, exported):
    _, program = exported(layers=3, kv_heads=2)
    graph, _ = select(toy, program, (1,), (0.5,))
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
    """``max(1, int(N * ratio))``, worked out at run time."""
    _, program = exported(layers=3, kv_heads=2)
    graph, _ = select(toy, program, (1,), (ratio,), ExposeOutputs())
    inputs = toy.make_inputs(1, 40) | {"visual_index": toy.make_visual_index(1, 40, tokens)}
    routing = toy.call(to_program(graph, program), inputs)["routing"]
    assert routing["selected.1"].shape == (1, keep)
    assert routing["scores.1"].shape == (1, tokens)


def test_result_exports_again(toy, exported):
    _, program = exported(kv_heads=2)
    graph, _ = select(toy, program, (1,), (0.5,), ExposeOutputs())
    inputs, other = (
        toy.make_inputs(*size) | {"visual_index": toy.make_visual_index(*size, tokens)}
        for size, tokens in (((2, 64), 40), ((3, 40), 13))
    )
    toy.assert_exports_again(to_program(graph, program), inputs, other)


def test_no_decisions_change_nothing(toy, exported):
    _, program = exported(layers=3, kv_heads=2)
    graph, result = select(toy, program, (), ())
    assert (result.matched, result.rewritten) == (0, 0)
    assert graph.decisions == ()
    assert graph.visual_index is None
    assert [n.name for n in graph.inputs] == ["inputs_embeds", "position_ids"]


def test_layer_beyond_the_decoder_is_refused(toy, exported):
    _, program = exported(layers=3, kv_heads=2)
    with pytest.raises(
        MatchError, match=r"decision_layers has 3, but the graph has 3 layers; expected 1\.\.2"
    ):
        select(toy, program, (1, 3), (0.5, 0.25))


def test_a_ratio_is_needed_for_each_layer():
    with pytest.raises(ValueError, match="shorter"):
        InsertSelection((1, 2), (0.5,))


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
        select(toy, program, (1,), (0.5,))


def centred(normed):
    return normed - normed.mean(1, keepdim=True)


def accumulated(normed):
    return normed.cumsum(1)


@pytest.mark.parametrize(("mix", "name"), [(centred, "mean"), (accumulated, "cumsum")])
def test_query_that_depends_on_other_rows_is_refused(toy, mix, name):
    """From the last row alone the layer's query can't be computed."""

    def run(decoder, hidden, cos, sin, mask):
        for layer in decoder.layers:
            normed = mix(layer.input_norm(hidden))
            hidden = hidden + layer.attention(normed, normed, cos, sin, mask)
        return hidden

    program = toy.export(toy.Decoder(run=run))
    with pytest.raises(MatchError, match=rf"%{name}\w*"):
        select(toy, program, (1,), (0.5,))


def test_static_length_is_refused(toy):
    with torch.no_grad():
        program = torch.export.export(toy.Decoder(), (), toy.make_inputs())
    with pytest.raises(MatchError, match=r"%inputs_embeds .*(dynamic|symbolic)"):
        select(toy, program, (1,), (0.5,))
