"""FindLayers: one closed stretch of the residual stream around each attention, or a refusal."""

import pytest
import torch
from suite_tiers import one
from torch import nn
from torch.export import Dim

from reroute_fx import RoutingConfig
from reroute_fx.passes import ACTIONS, FindLayers, MatchError, run_passes, to_program
from reroute_fx.pipeline import route

aten = torch.ops.aten


def find(toy, program, num_layers=None):
    graph, results = run_passes(program, toy.passes(4, num_layers))
    return graph, results[-1]


def refusal(toy, program, num_layers=None):
    """The graph before the pass and what the pass says about it."""
    graph, _ = run_passes(program, toy.passes(3))
    with pytest.raises(MatchError) as caught:
        FindLayers(num_layers)(graph)
    return graph.fx_graph, str(caught.value)


def attention_names(toy, graph):
    return [n.name for n in toy.operators(graph, aten.scaled_dot_product_attention)]


@pytest.mark.parametrize("num_layers", [None, 3])
@pytest.mark.parametrize(
    "options", [{}, {"kv_heads": 2}, {"parallel": True}], ids=["plain", "grouped", "parallel"]
)
def test_layers_of_a_decoder(toy, exported, options, num_layers):
    _, program = exported(layers=3, **options)
    graph, result = find(toy, program, num_layers)
    assert (result.matched, result.rewritten, len(graph.layers)) == (3, 0, 3)
    attentions = toy.operators(graph.fx_graph, aten.scaled_dot_product_attention)
    assert [layer.attention for layer in graph.layers] == attentions
    assert [layer.index for layer in graph.layers] == [0, 1, 2]
    assert graph.layers[0].start.name == "inputs_embeds"
    assert [layer.end for layer in graph.layers[:-1]] == [layer.start for layer in graph.layers[1:]]
    assert all(layer.end.target is aten.add.Tensor for layer in graph.layers)


def test_layers_are_closed_and_complete(toy, exported):
    _, program = exported(layers=3, kv_heads=2)
    graph, _ = find(toy, program)
    order = {node: place for place, node in enumerate(graph.fx_graph.nodes)}
    seen = set()
    for layer in graph.layers:
        nodes = set(layer.nodes)
        assert [order[n] for n in layer.nodes] == sorted(order[n] for n in nodes)
        assert layer.start not in nodes
        assert not nodes & seen
        assert sum(node.target is aten.linear.default for node in nodes) == 7
        assert all(user in nodes for node in nodes - {layer.end} for user in node.users)
        assert {node.meta["region"] for node in nodes} == {f"layer.{layer.index}"}
        seen |= nodes
    outside = set(graph.fx_graph.nodes) - seen
    assert not any(str(node.meta.get("region", "")).startswith("layer.") for node in outside)
    assert not any(node.target is aten.linear.default for node in outside)


@pytest.mark.parametrize(("kv_heads", "options"), [(4, {}), (2, {}), (4, {"parallel": True})])
def test_sizes(toy, exported, kv_heads, options):
    _, program = exported(layers=3, kv_heads=kv_heads, **options)
    graph, _ = find(toy, program)
    width, mlp, kv_width = toy.WIDTH, 2 * toy.WIDTH, kv_heads * toy.HEAD_DIM
    for layer in graph.layers:
        assert layer.sizes.linear == 2 * width * width + 2 * width * kv_width + 3 * width * mlp
        assert layer.sizes.query == width * width
        assert layer.sizes.key == width * kv_width
        assert layer.sizes.attention_width == toy.HEADS * toy.HEAD_DIM
        assert layer.sizes.kv_width == kv_width


def test_nothing_is_changed(toy, exported):
    model, program = exported(kv_heads=2)
    before, _ = run_passes(program, toy.passes(3))
    graph, _ = find(toy, program)
    assert [n.name for n in graph.fx_graph.nodes] == [n.name for n in before.fx_graph.nodes]
    edited = to_program(graph, program)
    toy.assert_agrees(edited, model, toy.make_inputs(3, 40))
    toy.assert_exports_again(edited, toy.make_inputs(), toy.make_inputs(3, 40))


def residual_first(decoder, hidden, cos, sin, mask):
    """``(hidden + attention) + mlp``: the first sum is no cut of the stream."""
    for layer in decoder.layers:
        normed = layer.input_norm(hidden)
        hidden = hidden + layer.attention(normed, normed, cos, sin, mask) + layer.mlp(normed)
    return hidden


def test_parallel_layout_that_adds_to_the_residual_first(toy, exported):
    _, program = exported(run=residual_first)
    graph, result = find(toy, program, 2)
    assert result.matched == 2
    assert graph.layers[0].start.name == "inputs_embeds"
    assert graph.layers[0].end is graph.layers[1].start


class FromTokens(nn.Module):
    """Token ids in place of embeddings, scaled as some decoders do."""

    def __init__(self, decoder, width):
        super().__init__()
        self.table = nn.Embedding(11, width)
        self.decoder = decoder

    def forward(self, tokens, position_ids):
        return self.decoder(self.table(tokens) * 5.0, position_ids)


def test_stream_starts_at_the_scaled_embeddings(toy):
    positions = toy.make_inputs()["position_ids"]
    inputs = {"tokens": positions % 11, "position_ids": positions}
    graph, result = find(toy, toy.export(FromTokens(toy.Decoder(), toy.WIDTH), inputs), 2)
    assert result.matched == 2
    start = graph.layers[0].start
    assert start.target is aten.mul.Tensor
    assert start.args[0].target is aten.embedding.default


@pytest.mark.parametrize("num_layers", [2, 5])
def test_another_number_of_layers_is_refused(toy, exported, num_layers):
    _, program = exported(layers=3)
    _, message = refusal(toy, program, num_layers)
    assert message.startswith(f"3 decoder layers were found; expected {num_layers} decoder layers.")


def without_one_attention(decoder, hidden, cos, sin, mask):
    for index, layer in enumerate(decoder.layers):
        hidden = hidden + layer.mlp(hidden) if index == 2 else layer(hidden, cos, sin, mask)
    return hidden


def test_layer_without_attention_is_named_when_layers_are_counted(toy, exported):
    _, program = exported(layers=4, run=without_one_attention)
    graph, message = refusal(toy, program, 4)
    assert "3 decoder layers were found; expected 4 decoder layers." in message
    assert f"Nearest miss: %{attention_names(toy, graph)[1]}: layer 1 around it has" in message


def without_attention(decoder, hidden, cos, sin, mask):
    for layer in decoder.layers:
        hidden = hidden + layer.mlp(layer.output_norm(hidden))
    return hidden


def test_no_attention_is_refused(toy, exported):
    _, program = exported(run=without_attention)
    _, message = refusal(toy, program)
    assert message == "No attention was found; expected at least one decoder layer."


def cross_attending(toy, keys_from_memory, values_from_memory):
    """Layer 1 takes keys or values, causally, from another input of the same length."""
    held = {}

    def run(decoder, hidden, cos, sin, mask):
        first, second, third = decoder.layers
        hidden = first(hidden, cos, sin, mask)
        normed = second.input_norm(hidden)
        query = toy.rotate(second.split_heads(second.query(normed)), cos, sin)
        keys = second.key(held["memory"] if keys_from_memory else normed)
        values = second.value(held["memory"] if values_from_memory else normed)
        key, value = toy.rotate(second.split_heads(keys), cos, sin), second.split_heads(values)
        result = toy.sdpa(query, key, value, mask)
        hidden = hidden + second.output(result.transpose(1, 2).flatten(2))
        hidden = hidden + second.mlp(second.output_norm(hidden))
        return third(hidden, cos, sin, mask)

    class CrossAttention(toy.Decoder):
        def forward(self, inputs_embeds, position_ids, memory):
            held["memory"] = memory
            return super().forward(inputs_embeds, position_ids)

    inputs = toy.make_inputs()
    inputs["memory"] = inputs["inputs_embeds"].flip(1)
    return toy.export(CrossAttention(layers=3, run=run), inputs)


@one("2 s each")
@pytest.mark.parametrize(
    ("keys_from_memory", "values_from_memory"), [(True, True), (True, False), (False, True)]
)
def test_cross_attention_is_refused(toy, keys_from_memory, values_from_memory):
    program = cross_attending(toy, keys_from_memory, values_from_memory)
    graph, message = refusal(toy, program)
    assert f"%{attention_names(toy, graph)[1]}: its {'keys' if keys_from_memory else 'values'} %" in message
    assert "come from outside the residual stream" in message


def test_eager_cross_attention_to_a_shorter_input_is_refused(toy):
    held = {}

    def attend(query, key, value, mask):
        memory = held["memory"].unflatten(-1, (toy.HEADS, toy.HEAD_DIM)).transpose(1, 2)
        return (query @ memory.transpose(2, 3)).softmax(-1) @ memory

    class CrossAttention(toy.Decoder):
        def forward(self, inputs_embeds, position_ids, memory):
            held["memory"] = memory
            return super().forward(inputs_embeds, position_ids)

    inputs = toy.make_inputs() | {"memory": torch.ones(2, 10, toy.WIDTH)}
    model = CrossAttention(layers=3, odd_layer=1, odd_attend=attend)
    program = toy.export(model, inputs, memory={0: Dim("batch", min=1)})
    with pytest.raises(MatchError, match=r"%(softmax|matmul)\w*: "):
        find(toy, program)


def attends_to_the_embeddings(decoder, hidden, cos, sin, mask):
    embeds = hidden
    first, second, third = decoder.layers
    hidden = second(first(hidden, cos, sin, mask), cos, sin, mask)
    return hidden + third.attention(hidden, embeds, cos, sin, mask)


def test_attention_to_the_embeddings_is_refused(toy, exported):
    """The keys of layer 2 are computed from the input of layer 0."""
    _, program = exported(layers=3, run=attends_to_the_embeddings)
    graph, message = refusal(toy, program)
    named = message.split("Nearest miss: %")[1].split(":")[0]
    assert named in {node.name for node in graph.nodes}


def adds_an_attention_again(decoder, hidden, cos, sin, mask):
    for index, layer in enumerate(decoder.layers):
        normed = layer.input_norm(hidden)
        attention = layer.attention(normed, normed, cos, sin, mask)
        if index == 0:
            early = attention
        hidden = hidden + attention
        hidden = hidden + layer.mlp(layer.output_norm(hidden))
        if index == 2:
            hidden = hidden + early
    return hidden


def projection(toy, graph, name):
    (linear,) = [n for n in toy.operators(graph, aten.linear) if n.args[1].name == name]
    return linear


def test_attention_output_added_two_layers_later_is_refused(toy, exported):
    _, program = exported(layers=4, run=adds_an_attention_again)
    graph, message = refusal(toy, program)
    early = projection(toy, graph, "p_layers_0_output_weight")
    _, later = early.users
    assert f"%{early.name}: it is inside a layer and also read outside, by %{later.name}" in message


def test_residual_value_that_is_also_an_output_is_refused(toy):
    held = {}

    def run(decoder, hidden, cos, sin, mask):
        for index, layer in enumerate(decoder.layers):
            hidden = layer(hidden, cos, sin, mask)
            if index == 1:
                held["middle"] = hidden
        return hidden

    class ReturnsTwo(toy.Decoder):
        def forward(self, inputs_embeds, position_ids):
            result = super().forward(inputs_embeds, position_ids)
            return result, held["middle"]

    graph, message = refusal(toy, toy.export(ReturnsTwo(layers=4, run=run)))
    middle = graph.output_node().args[0][1]
    assert f"%{middle.name}: " in message
    assert "output" in message


def test_keys_that_are_also_an_output_are_refused(toy):
    held = {}

    def keep(query, key, value, mask):
        held["keys"] = key
        return toy.sdpa(query, key, value, mask)

    class ReturnsKeys(toy.Decoder):
        def forward(self, inputs_embeds, position_ids):
            result = super().forward(inputs_embeds, position_ids)
            return result, held["keys"]

    program = toy.export(ReturnsKeys(layers=3, odd_layer=1, odd_attend=keep))
    graph, message = refusal(toy, program)
    keys = graph.output_node().args[0][1]
    assert f"%{keys.name}: " in message
    assert "also read outside, by %output" in message


def replaces_the_stream(decoder, hidden, cos, sin, mask):
    first, second, third = decoder.layers
    hidden = first(hidden, cos, sin, mask)
    hidden = second.attention(hidden, hidden, cos, sin, mask)
    return third(hidden, cos, sin, mask)


def test_attention_that_replaces_the_stream_is_refused(toy, exported):
    _, program = exported(layers=3, run=replaces_the_stream)
    graph, message = refusal(toy, program)
    assert message.startswith("2 decoder layers were found")
    assert f"Nearest miss: %{projection(toy, graph, 'p_layers_1_output_weight').name}: " in message


class Adding(nn.Module):
    """A decoder that adds to its stream what does not come from it: per token, as a bias, and through a layer."""

    def __init__(self, toy):
        super().__init__()
        self.toy, self.inner = toy, toy.Decoder(layers=4)
        self.bias = nn.Parameter(torch.randn(toy.WIDTH))
        self.mix = nn.Linear(toy.WIDTH, toy.WIDTH)

    def forward(self, inputs_embeds, position_ids, first, second):
        toy, hidden = self.toy, inputs_embeds
        cos, sin = toy.rotary(self.inner, position_ids)
        mask = toy.causal_mask(None, hidden)
        for number, layer in enumerate(self.inner.layers):
            hidden = layer(hidden, cos, sin, mask)
            if number == 0:
                hidden = hidden + self.bias
            elif number == 1:
                hidden = second + (hidden + first)
            elif number == 2:
                hidden = hidden + self.mix(hidden)
        return hidden


@pytest.fixture(scope="module")
def adding(toy):
    inputs = toy.make_inputs()
    more = {name: torch.randn(inputs["inputs_embeds"].shape) for name in ("first", "second")}
    model = Adding(toy)
    return model, toy.export(model, inputs | more)


def test_what_is_added_for_each_token_belongs_to_the_layer_before(toy, adding):
    """Neither a bias nor what comes of the stream is such an addition."""
    graph, _ = find(toy, adding[1], 4)
    assert [[node.name for node in layer.addends] for layer in graph.layers] == [
        [],
        ["first", "second"],
        [],
        [],
    ]


@one("4 s each")
@pytest.mark.parametrize("action", ACTIONS)
def test_it_is_compacted_with_its_stage(toy, adding, action):
    """Keeping everything is the decoder, and the routed program exports again."""
    model, program = adding
    everything, config = (RoutingConfig((1, 3), ratios, action) for ratios in ((1.0, 1.0), (0.5, 0.25)))

    def prompt(config, *shape):
        inputs = toy.make_prompt(config, *shape)
        size, random = inputs["inputs_embeds"].shape, torch.Generator().manual_seed(0)
        return inputs | {name: torch.randn(size, generator=random) for name in ("first", "second")}

    given = prompt(everything, (20, 20), ((8,), (8,)))
    own = {name: given[name] for name in ("inputs_embeds", "position_ids", "first", "second")}
    routed, _ = route(program, everything)
    with torch.no_grad():
        assert torch.equal(toy.call(routed, given)["output"], model(**own))
    routed, _ = route(program, config)
    shapes = ((20, 14), ((8,), (5,))), ((33, 9), ((12,), (4,)))
    toy.assert_exports_again(routed, *(prompt(config, *shape) for shape in shapes))
