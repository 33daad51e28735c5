"""Keys and values that layers share, something of the embeddings that all layers read, and a stream that is scaled.

Models with them are held against plain loops in tests/test_shared_caches.py.
"""

import pytest
import torch
import torch.nn.functional as F

from reroute_fx import RoutingConfig, route
from reroute_fx.passes import ACTIONS, FindLayers, MatchError, run_passes, to_program
from reroute_fx.passes.shared_caches import cache_owners, sources
from reroute_fx.pipeline import continuation, unrouted

aten = torch.ops.aten


def sharing(decoder, hidden, cos, sin, mask, take=lambda lent, index: lent[index % 2]):
    """Of four layers the later two attend with what `take` gives them, keys and values of an earlier layer."""
    first = decoder.layers[0]
    beside, lent = torch.tanh(first.up(hidden)), []
    for index, layer in enumerate(decoder.layers):
        normed = layer.input_norm(hidden)
        query = decoder.rotate(layer.split_heads(layer.query(normed)), cos, sin)
        if index < 2:
            key = decoder.rotate(layer.split_heads(layer.key(normed)), cos, sin)
            lent.append((key, layer.split_heads(layer.value(normed))))
        result = F.scaled_dot_product_attention(query, *take(lent, index), attn_mask=mask)
        hidden = hidden + layer.output(result.transpose(1, 2).flatten(2))
        hidden = hidden + layer.down(F.silu(layer.gate(layer.output_norm(hidden))) * beside)
        hidden = hidden * (0.7 + 0.1 * index)
    return hidden


@pytest.fixture(scope="module")
def shared(toy):
    model = toy.Decoder(layers=4, run=sharing)
    model.rotate = toy.rotate
    return model, toy.export(model)


def test_layers_know_whose_keys_and_values_they_read(toy, shared):
    model, program = shared
    graph, _ = run_passes(program, toy.passes(4, 4))
    assert [layer.source for layer in graph.layers] == [None, None, 0, 1]
    assert sources(graph.layers) == (0, 1, 0, 1)
    assert [layer.sizes.key for layer in graph.layers] == [toy.WIDTH**2] * 2 + [0] * 2
    toy.assert_agrees(to_program(graph, program), model, toy.make_inputs(3, 40))


def test_a_number_belongs_to_the_layer_before_it(toy, shared):
    graph, _ = run_passes(shared[1], toy.passes(4, 4))
    assert {layer.end.target for layer in graph.layers} == {aten.mul.Tensor}
    assert [layer.end for layer in graph.layers[:-1]] == [layer.start for layer in graph.layers[1:]]


def test_what_layers_read_of_the_embeddings_is_in_none_of_them(toy, shared):
    graph, _ = run_passes(shared[1], toy.passes(4, 4))
    (beside,) = toy.operators(graph.fx_graph, aten.tanh)
    assert not any({beside, *beside.all_input_nodes} & set(layer.nodes) for layer in graph.layers)


@pytest.mark.full("1 s each; routed as by hand in the gate")
@pytest.mark.parametrize("action", ACTIONS)
def test_everything_kept_is_the_decoder(toy, shared, action):
    model, program = shared
    config = RoutingConfig((1, 2), (1.0, 1.0), action)
    routed, _ = route(program, config)
    inputs = toy.make_prompt(config, (20, 20), ((9,), (9,)))
    with torch.no_grad():
        expected = model(inputs["inputs_embeds"], inputs["position_ids"])
    torch.testing.assert_close(toy.call(routed, inputs)["output"], expected, atol=1e-5, rtol=0)


@pytest.mark.full("2 s each; programs of other decoders are exported again in the gate")
@pytest.mark.parametrize("action", ACTIONS)
def test_routed_program_exports_again(toy, shared, action):
    config = RoutingConfig((1, 2), (0.5, 0.3), action)
    routed, _ = route(shared[1], config)
    inputs, other = (toy.make_prompt(config, (n, n), ((k,), (k,))) for n, k in ((64, 40), (30, 13)))
    toy.assert_exports_again(routed, inputs, other)


def test_a_stage_caches_what_its_layers_share_once(shared):
    following = continuation(shared[1], (1, 3))
    taken = {name for name in following.graph_signature.user_inputs if name.startswith("key_cache")}
    assert taken == {"key_cache_0", "key_cache_1", "key_cache_2", "key_cache_3"}
    following = continuation(shared[1], (1,))
    assert "key_cache_3" not in following.graph_signature.user_inputs
    prompt = unrouted(shared[1])
    assert "key_cache_2" not in continuation(shared[1]).graph_signature.user_inputs
    assert len(prompt.graph_signature.user_outputs) == 1 + 2 * 2


def test_one_cache_for_a_stage_and_a_source():
    found = (0, 1, 2, 1, 1, 2)
    assert cache_owners(found, (1, 3)) == (0, 1, 2, 3, 3, 5)
    assert cache_owners(found, (0, 1, 4)) == (0, 1, 2, 1, 4, 5)
    assert cache_owners(found, ()) == found
    assert cache_owners(range(3), (1,)) == (0, 1, 2)


def test_keys_and_values_of_two_layers_are_refused(toy):
    def mixed(lent, index):
        return lent[index] if index < 2 else (lent[0][0], lent[1][1])

    model = toy.Decoder(layers=4, run=lambda *given: sharing(*given, take=mixed))
    model.rotate = toy.rotate
    graph, _ = run_passes(toy.export(model), toy.passes(3))
    with pytest.raises(MatchError, match="it is inside a layer and also read outside"):
        FindLayers(4)(graph)


def test_contiguous_positions_are_refused_across_stages(shared):
    contiguous = RoutingConfig((1, 2), (0.5, 0.3), positions="contiguous")
    with pytest.raises(
        MatchError, match=r"Layer 2 attends with keys of layer 0, .* expected positions 'original'"
    ):
        route(shared[1], contiguous)
