"""Costs on paper: against formulas written out for Llama-like layers and against torch's FLOP counter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

from reroute_fx.analysis.theory import REFERENCE_TEXT, LayerCost, PrefillCost, prefill_cost
from reroute_fx.config.routing_config import RoutingConfig
from reroute_fx.kernels import visual_scores_reference
from reroute_fx.passes import LayerSizes

LLAVA = (4096, 32, 32, 11008)
QWEN = (3584, 28, 4, 18944)
SMALL = (32, 4, 2, 80)


def flops_of_a_llama_layer(width, heads, kv_heads, feed_forward, rows):
    """FLOPs matrix by matrix, 2 for each multiply-add."""
    head_dim = width // heads
    query_projection = output_projection = 2 * rows * width * (heads * head_dim)
    key_projection = value_projection = 2 * rows * width * (kv_heads * head_dim)
    gate = up = down = 2 * rows * width * feed_forward
    query_times_key = weights_times_value = heads * (2 * rows * rows * head_dim)
    projections = query_projection + key_projection + value_projection + output_projection
    return projections + gate + up + down + query_times_key + weights_times_value


@pytest.mark.parametrize("rows", [1, 63, 500, 616])
@pytest.mark.parametrize("sizes", [LLAVA, QWEN, SMALL], ids=str)
def test_layer_flops_match_the_sum_over_matrices(sizes, rows):
    assert LayerCost.dense(*sizes).flops(rows) == flops_of_a_llama_layer(*sizes, rows)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    head_dim=st.integers(1, 64),
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 4),
    feed_forward=st.integers(1, 300),
    rows=st.integers(1, 2000),
)
def test_flops_of_any_sizes_match_the_sum_over_matrices(head_dim, kv_heads, group, feed_forward, rows):
    sizes = (kv_heads * group * head_dim, kv_heads * group, kv_heads, feed_forward)
    assert LayerCost.dense(*sizes).flops(rows) == flops_of_a_llama_layer(*sizes, rows)


def test_sizes_of_a_layer_with_grouped_heads():
    layer = LayerCost.dense(*QWEN)
    assert (layer.query, layer.key) == (3584 * 3584, 3584 * 512)
    assert (layer.attention_width, layer.kv_width) == (3584, 512)
    assert layer.linear == 2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944


def test_layer_cost_of_measured_sizes():
    sizes = LayerSizes(linear=100, query=20, key=10, attention_width=8, kv_width=4)
    layer = LayerCost.of(sizes)
    assert type(layer) is LayerCost
    assert vars(layer) == vars(sizes)
    assert layer.flops(3) == 2 * 100 * 3 + 4 * 8 * 3 * 3
    assert layer.scoring_flops(3) == 2 * (10 * 3 + 20 + 8 * 3)
    assert layer.kv_bytes(3, 2) == 2 * 4 * 3 * 2


def count_layer_flops(layer_class, rotary_class, config, rows):
    """What torch counts in one decoder layer with eager attention.

    Eager attention multiplies the full query-by-key rectangle, with keys and values repeated to one for
    each query head. The rotary tables are computed outside: they belong to no layer.
    """
    torch.manual_seed(0)
    layer = layer_class(config, 0).eval()
    hidden = torch.randn(2, rows, config.hidden_size)
    position_ids = torch.arange(rows)[None]
    rotary = rotary_class(config)(hidden, position_ids)
    mask = torch.full((rows, rows), -torch.inf).triu(1)[None, None]
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        layer(hidden, attention_mask=mask, position_ids=position_ids, position_embeddings=rotary)
    return counter.get_total_flops() // len(hidden)


@pytest.mark.parametrize("rows", [1, 7, 63])
@pytest.mark.parametrize(
    "sizes", [(32, 4, 4, 80), SMALL, (48, 6, 1, 40)], ids=["all heads", "grouped heads", "one key head"]
)
@pytest.mark.parametrize(
    ("config_class", "layer_class", "rotary_class"),
    [
        (LlamaConfig, LlamaDecoderLayer, LlamaRotaryEmbedding),
        (Qwen2Config, Qwen2DecoderLayer, Qwen2RotaryEmbedding),
    ],
    ids=["Llama", "Qwen2"],
)
def test_layer_flops_match_the_flop_counter(config_class, layer_class, rotary_class, sizes, rows):
    width, heads, kv_heads, feed_forward = sizes
    config = config_class(
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=feed_forward,
        num_hidden_layers=1,
        vocab_size=16,
        attn_implementation="eager",
    )
    counted = count_layer_flops(layer_class, rotary_class, config, rows)
    assert LayerCost.dense(*sizes).flops(rows) == counted


@pytest.mark.parametrize("rows", [1, 63])
@pytest.mark.parametrize("sizes", [(32, 4, 4, 80), SMALL], ids=["all heads", "grouped heads"])
def test_scoring_flops_match_the_flop_counter(sizes, rows):
    width, heads, kv_heads, _ = sizes
    head_dim = width // heads
    hidden = torch.randn(1, rows, width)
    query_weight, key_weight = torch.randn(heads * head_dim, width), torch.randn(kv_heads * head_dim, width)
    counter = FlopCounterMode(display=False)
    with counter:
        query = torch.nn.functional.linear(hidden[:, -1:], query_weight)
        keys = torch.nn.functional.linear(hidden, key_weight)
        visual_scores_reference(
            query.view(1, 1, heads, head_dim).transpose(1, 2),
            keys.view(1, rows, kv_heads, head_dim).transpose(1, 2),
            torch.arange(rows)[None],
            torch.tensor([rows]),
            head_dim**-0.5,
        )
    assert LayerCost.dense(*sizes).scoring_flops(rows) == counter.get_total_flops()


@pytest.mark.parametrize(("sizes", "layers", "tflops"), [(LLAVA, 32, 8.18), (QWEN, 28, 8.19)])
def test_unrouted_7b_prefill(sizes, layers, tflops):
    cost = prefill_cost([LayerCost.dense(*sizes)] * layers, None)
    assert cost.flops / 1e12 == pytest.approx(tflops, abs=0.005)
    assert cost == prefill_cost(
        [LayerCost.dense(*sizes)] * layers, None, visual_tokens=576, text_tokens=40, element_bytes=2
    )
    assert REFERENCE_TEXT == 40


@pytest.mark.parametrize(("sizes", "layers", "mib"), [(LLAVA, 32, 308), (QWEN, 28, 33.6875)])
def test_unrouted_7b_cache(sizes, layers, mib):
    stack = [LayerCost.dense(*sizes)] * layers
    assert prefill_cost(stack, None).kv_bytes == mib * 2**20
    assert prefill_cost(stack, None, element_bytes=4).kv_bytes == 2 * mib * 2**20


def test_unrouted_prefill_has_no_scoring():
    layer = LayerCost.dense(*SMALL)
    cost = prefill_cost([layer] * 3, None, visual_tokens=20, text_tokens=5)
    assert cost == PrefillCost(3 * layer.flops(25), 0, 3 * layer.kv_bytes(25, 2))
    assert cost.flops == cost.layer_flops


DECISIONS = {1: 10, 3: 6, 4: 3}
"""Tokens kept of 20 before these layers of 6, by ratios 0.5, 0.3 and 0.15."""
ENTERING = (20, 10, 10, 6, 3, 3)


def routed(action):
    config = RoutingConfig(tuple(DECISIONS), (0.5, 0.3, 0.15), action)
    assert config.keep_counts(20) == tuple(DECISIONS.values())
    return config


@pytest.mark.parametrize("action", ["physical_delete", "compact_route", "compact_route_stagewise"])
def test_routed_layers_cost_what_their_rows_cost(action):
    layers = [LayerCost.dense(*SMALL)] * 6
    cost = prefill_cost(layers, routed(action), visual_tokens=20, text_tokens=5, element_bytes=4)
    assert cost.layer_flops == sum(flops_of_a_llama_layer(*SMALL, tokens + 5) for tokens in ENTERING)
    assert cost.kv_bytes == sum(2 * 16 * 4 * (tokens + 5) for tokens in ENTERING)
    assert cost.flops == cost.layer_flops + cost.scoring_flops


def scoring_of_small(rows):
    key_projection, query_projection, products = rows * 32 * 16, 32 * 32, rows * 32
    return 2 * (key_projection + query_projection + products)


@pytest.mark.parametrize("action", ["compact_route", "compact_route_stagewise"])
def test_routing_scores_every_row_at_each_decision(action):
    layers = [LayerCost.dense(*SMALL)] * 6
    cost = prefill_cost(layers, routed(action), visual_tokens=20, text_tokens=5)
    assert cost.scoring_flops == 3 * scoring_of_small(25)


def test_deletion_scores_the_rows_that_are_left():
    layers = [LayerCost.dense(*SMALL)] * 6
    cost = prefill_cost(layers, routed("physical_delete"), visual_tokens=20, text_tokens=5)
    assert cost.scoring_flops == sum(map(scoring_of_small, (20 + 5, 10 + 5, 6 + 5)))


def test_a_single_decision_scores_the_same_pool_for_all_actions():
    layers = [LayerCost.dense(*SMALL)] * 6
    costs = {
        prefill_cost(layers, RoutingConfig((2,), (0.25,), action), visual_tokens=20, text_tokens=5)
        for action in ("physical_delete", "compact_route", "compact_route_stagewise")
    }
    assert len(costs) == 1


def test_layers_of_different_sizes_are_charged_each_at_its_place():
    wide, narrow = LayerCost.dense(*SMALL), LayerCost.dense(16, 2, 1, 24)
    config = RoutingConfig((1,), (0.5,))
    cost = prefill_cost([wide, narrow], config, visual_tokens=20, text_tokens=5)
    assert cost.layer_flops == wide.flops(25) + narrow.flops(15)
    assert cost.scoring_flops == narrow.scoring_flops(25)
    assert cost.kv_bytes == wide.kv_bytes(25, 2) + narrow.kv_bytes(15, 2)


def test_keeping_every_token_costs_only_the_scoring_more():
    layers = [LayerCost.dense(*SMALL)] * 6
    kept = prefill_cost(layers, RoutingConfig((2, 4), (1.0, 1.0)), visual_tokens=20, text_tokens=5)
    unrouted = prefill_cost(layers, None, visual_tokens=20, text_tokens=5)
    assert (kept.layer_flops, kept.kv_bytes) == (unrouted.layer_flops, unrouted.kv_bytes)
    assert kept.scoring_flops == 2 * scoring_of_small(25)
