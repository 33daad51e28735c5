"""CanonicalizeAttention: known spellings become one, any other is refused with the count and the nearest miss."""

import pytest
import torch
import torch.nn.functional as F
from suite_tiers import one

from reroute_fx.passes import MatchError, run_passes, to_program

aten = torch.ops.aten
HEADS, HEAD_DIM = 4, 8
SCALE = HEAD_DIM**-0.5


def canonicalize(toy, program):
    graph, results = run_passes(program, toy.passes(2))
    return graph, results[1], toy.operators(graph.fx_graph, aten.scaled_dot_product_attention)


def assert_canonical(nodes, *, kv_heads=HEADS, scale=SCALE, is_causal=False):
    for node in nodes:
        query, key, value, _, dropout, causal = node.args
        assert query.meta["val"].shape[1] == HEADS
        assert key.meta["val"].shape[1] == value.meta["val"].shape[1] == kv_heads
        assert (dropout, causal) == (0.0, is_causal)
        assert node.kwargs == {"scale": pytest.approx(scale), "enable_gqa": kv_heads != HEADS}


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_fused_attention(toy, exported, kv_heads):
    model, program = exported(kv_heads=kv_heads)
    graph, result, nodes = canonicalize(toy, program)
    assert result.matched == result.rewritten == len(nodes) == 2
    assert_canonical(nodes, kv_heads=kv_heads)
    repeated = 0 if kv_heads == HEADS else 4
    assert len(toy.operators(program.graph, aten.expand)) == repeated
    assert toy.operators(graph.fx_graph, aten.expand) == []
    toy.assert_agrees(to_program(graph, program), model, toy.make_inputs(3, 40))


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_eager_attention(toy, exported, kv_heads):
    model, program = exported(kv_heads=kv_heads, attend=toy.eager, mask=toy.additive_mask)
    assert len(toy.operators(program.graph, aten.softmax)) == 2
    assert len(toy.operators(program.graph, aten.matmul)) == 4
    graph, result, nodes = canonicalize(toy, program)
    assert result.matched == result.rewritten == len(nodes) == 2
    assert toy.operators(graph.fx_graph, aten.softmax, aten.matmul, aten.expand) == []
    assert_canonical(nodes, kv_heads=kv_heads)
    toy.assert_agrees(to_program(graph, program), model, toy.make_inputs(3, 40))


@pytest.mark.parametrize("eager", [False, True])
def test_result_exports_again(toy, exported, eager):
    spelling = {"attend": toy.eager, "mask": toy.additive_mask} if eager else {}
    _, program = exported(kv_heads=2, **spelling)
    graph, _, _ = canonicalize(toy, program)
    toy.assert_exports_again(to_program(graph, program), toy.make_inputs(), toy.make_inputs(3, 40))


def test_second_run_changes_nothing(toy, exported):
    _, program = exported(kv_heads=2)
    once, _, _ = canonicalize(toy, program)
    again, result, nodes = canonicalize(toy, to_program(once, program))
    assert result.matched == 2
    assert_canonical(nodes, kv_heads=2)
    assert len(again.fx_graph.nodes) == len(once.fx_graph.nodes)


@pytest.fixture
def attentions(toy):
    """A function ``(attends, **options) -> (module, exported program)``."""

    def make(*attends, **options):
        module = toy.Blocks(attends, **options)
        return module, toy.export(module, embeddings(toy))

    return make


def embeddings(toy, *size):
    return {"inputs_embeds": toy.make_inputs(*size)["inputs_embeds"]}


def divided(query, key, value, mask):
    return ((query @ key.transpose(-1, -2)) / 4.0 + mask).softmax(-1) @ value


def unscaled(query, key, value, mask):
    return (query @ key.transpose(3, 2) + mask).softmax(3) @ value


def scaled_before(query, key, value, mask):
    return ((query * 0.25) @ key.transpose(2, 3) + mask).softmax(-1) @ value


def unmasked(query, key, value, mask):
    return (query @ key.transpose(2, 3) * 0.25).softmax(-1) @ value


def without_dropout(query, key, value, mask):
    weights = (query @ key.transpose(2, 3) * 0.25 + mask).softmax(-1)
    return F.dropout(weights, 0.5, training=False) @ value


def fused_with_scale(query, key, value, mask):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.25)


@pytest.mark.parametrize(
    ("attend", "scale"),
    [
        (divided, 0.25),
        (unscaled, 1.0),
        (scaled_before, 1.0),
        (unmasked, 0.25),
        (without_dropout, 0.25),
        (fused_with_scale, 0.25),
    ],
)
def test_scale_is_read(toy, attentions, attend, scale):
    module, program = attentions(attend, mask=toy.additive_mask)
    graph, result, nodes = canonicalize(toy, program)
    assert result.matched == len(nodes) == 1
    assert_canonical(nodes, scale=scale)
    assert (nodes[0].args[3] is None) == (attend is unmasked)
    toy.assert_agrees(to_program(graph, program), module, embeddings(toy, 3, 40))


def test_causal_flag_is_kept(toy, attentions):
    _, program = attentions(toy.sdpa_causal)
    _, result, nodes = canonicalize(toy, program)
    assert result.matched == 1
    assert_canonical(nodes, is_causal=True)


def repeats(repeat, repeat_values=None):
    """Fused attention whose keys and values are repeated from 2 to 4 heads first."""

    def attend(query, key, value, mask):
        key, value = repeat(key, 2), (repeat_values or repeat)(value, 2)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    return attend


def unsqueezed_from_the_end(tensor, times):
    batch, heads, length, width = tensor.shape
    wide = tensor.unsqueeze(-3).expand(batch, heads, times, length, width)
    return wide.reshape(batch, heads * times, length, width)


def interleaved(tensor, times):
    return tensor.repeat_interleave(times, dim=1)


def copied(tensor, times):
    """What `reshape` is traced to where the tensor is laid out such that it has to copy."""
    batch, heads, length, width = tensor.shape
    wide = tensor.unsqueeze(2).expand(batch, heads, times, length, width)
    return wide.clone(memory_format=torch.contiguous_format).view(batch, heads * times, length, width)


def grouped(query, key, value, mask):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


@pytest.mark.parametrize(
    "attend", [repeats(unsqueezed_from_the_end), repeats(interleaved), repeats(copied), grouped]
)
def test_keys_are_those_before_the_repeat(toy, attentions, attend):
    module, program = attentions(attend, kv_heads=2)
    graph, _, nodes = canonicalize(toy, program)
    assert_canonical(nodes, kv_heads=2)
    toy.assert_agrees(to_program(graph, program), module, embeddings(toy, 3, 40))


def tiled(tensor, times):
    batch, heads, length, width = tensor.shape
    wide = tensor[:, None].expand(batch, times, heads, length, width)
    return wide.reshape(batch, heads * times, length, width)


def tiled_by_copy(tensor, times):
    batch, heads, length, width = tensor.shape
    wide = tensor[:, None].expand(batch, times, heads, length, width)
    return wide.clone(memory_format=torch.contiguous_format).view(batch, heads * times, length, width)


def tiled_by_repeat(tensor, times):
    return tensor.repeat(1, times, 1, 1)


@pytest.mark.parametrize("tile", [tiled, tiled_by_copy, tiled_by_repeat])
def test_tiled_keys_are_refused(toy, attentions, tile):
    """Query head h reads key head h % Hkv here, which no cache of Hkv heads can serve as grouped attention."""
    _, program = attentions(repeats(tile), kv_heads=2)
    with pytest.raises(
        MatchError, match=r"0 attention blocks have a known form, 1 do not.*%scaled_dot_product"
    ):
        canonicalize(toy, program)


def test_tiled_keys_with_repeated_values_are_refused(toy, attentions):
    _, program = attentions(repeats(tiled, toy.repeat_heads), kv_heads=2)
    with pytest.raises(MatchError, match=r"%scaled_dot_product_attention: keys and values are not repeated"):
        canonicalize(toy, program)


@pytest.mark.parametrize(("kv_heads", "value_heads"), [(2, 4), (4, 2)])
def test_keys_repeated_without_the_values_are_refused(toy, kv_heads, value_heads):
    program = toy.export(toy.Decoder(layers=1, kv_heads=kv_heads, value_heads=value_heads))
    with pytest.raises(MatchError, match=r"%scaled_dot_product_attention: keys and values are not repeated"):
        canonicalize(toy, program)


def logits_of(query, key, mask):
    return torch.matmul(query, key.transpose(2, 3)) * SCALE + torch.where(mask, 0.0, -1e9)


def over_queries(query, key, value, mask):
    return logits_of(query, key, mask).softmax(-2) @ value


def permuted(query, key, value, mask):
    logits = query @ key.permute(0, 1, 3, 2) * SCALE + torch.where(mask, 0.0, -1e9)
    return logits.softmax(-1) @ value


def capped(query, key, value, mask):
    logits = torch.tanh(query @ key.transpose(2, 3) * SCALE / 30) * 30
    return (logits + torch.where(mask, 0.0, -1e9)).softmax(-1) @ value


def filled(query, key, value, mask):
    logits = (query @ key.transpose(2, 3) * SCALE).masked_fill(~mask, -1e9)
    return logits.softmax(-1) @ value


def dropped_weights(query, key, value, mask):
    return F.dropout(logits_of(query, key, mask).softmax(-1), 0.5, training=True) @ value


def dropped(query, key, value, mask):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=0.5)


def normalised_weights(query, key, value, mask):
    weights = logits_of(query, key, mask).softmax(-1)
    return (weights / weights.sum(-1, keepdim=True)) @ value


def weighs_the_last_rows(query, key, value, mask):
    weights = logits_of(query, key, mask).softmax(-1)
    return weights @ value + weights[..., -1:]


def gated_weights(query, key, value, mask):
    return (logits_of(query, key, mask).softmax(-1) * 0.5) @ value


@one("a second each; FindLayers and ProveCausal refuse odd layers, too")
@pytest.mark.parametrize(
    ("spelling", "operator", "reason"),
    [
        (over_queries, aten.softmax, "softmax over dimension -2, not over the keys"),
        (permuted, aten.softmax, "keys are not transposed over their last two dimensions"),
        (capped, aten.softmax, "its logits come from aten.tanh.default"),
        (filled, aten.softmax, "its logits come from aten.masked_fill.Scalar"),
        (dropped_weights, aten.softmax, "its result goes into aten.dropout.default"),
        (gated_weights, aten.softmax, "its result goes into aten.mul.Tensor"),
        (normalised_weights, aten.softmax, "has 2 users, expected one"),
        (weighs_the_last_rows, aten.softmax, "has 2 users, expected one"),
        (dropped, aten.scaled_dot_product_attention, "dropout 0.5 is active"),
    ],
)
def test_one_layer_spelled_differently_is_refused(toy, attentions, spelling, operator, reason):
    _, program = attentions(toy.sdpa, toy.sdpa, spelling, toy.sdpa)
    odd = toy.operators(program.graph, operator)[-1 if operator is aten.softmax else 2]
    with pytest.raises(MatchError) as caught:
        canonicalize(toy, program)
    message = str(caught.value)
    assert "3 attention blocks have a known form, 1 do not" in message
    assert f"Nearest miss: %{odd.name}: " in message
    assert reason in message


def merged_heads(query, key, value, mask):
    batch, heads, length, width = query.shape
    query, key, value = (x.reshape(batch * heads, length, width) for x in (query, key, value))
    logits = torch.bmm(query, key.transpose(1, 2)) * SCALE + torch.where(mask[0], 0.0, -1e9)
    return torch.bmm(logits.softmax(-1), value).view(batch, heads, length, width)


def heads_last(query, key, value, mask):
    logits = torch.einsum("bhqd,bhkd->bqkh", query, key) * SCALE
    logits = logits + torch.where(mask, 0.0, -1e9).permute(0, 2, 3, 1)
    return torch.einsum("bqkh,bhkd->bhqd", logits.softmax(2), value)


def to_the_first_row(query, key, value, mask):
    return (query @ key[:, :, :1].transpose(2, 3) * SCALE).softmax(-1) @ value[:, :, :1]


@pytest.mark.parametrize("spelling", [merged_heads, heads_last, to_the_first_row])
def test_attention_in_another_layout_is_not_overlooked(toy, attentions, spelling):
    """Where it is not taken for attention, it counts as something else that mixes tokens."""
    _, program = attentions(toy.sdpa, toy.sdpa, spelling, toy.sdpa)
    assert len(toy.operators(program.graph, aten.softmax)) == 1
    with pytest.raises(MatchError, match=r"Nearest miss: %(softmax|slice|bmm|matmul|le)\w*: "):
        run_passes(program, toy.passes(4))


def fused_with_merged_heads(query, key, value, mask):
    batch, heads, length, width = query.shape
    query, key, value = (x.reshape(batch * heads, length, width) for x in (query, key, value))
    result = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[0])
    return result.view(batch, heads, length, width)


def test_fused_attention_on_merged_heads_is_refused(toy, attentions):
    _, program = attentions(fused_with_merged_heads)
    with pytest.raises(
        MatchError, match=r"%scaled_dot_product_attention: query has shape .*not \[B, H, S, D\]"
    ):
        canonicalize(toy, program)


def adds_the_condition(query, key, value, mask):
    """Adds 1 to allowed logits; as a boolean attn_mask it would forbid the others."""
    return (query @ key.transpose(2, 3) * SCALE + mask).softmax(-1) @ value


def adds_a_faint_mask(query, key, value, mask):
    """The mask counts with a factor so small that nothing is masked."""
    logits = torch.add(query @ key.transpose(2, 3), torch.where(mask, 0.0, -1e9), alpha=1e-12)
    return logits.softmax(-1) @ value


@pytest.mark.parametrize("attend", [adds_the_condition, adds_a_faint_mask])
def test_addition_that_does_not_mask_is_refused(toy, attentions, attend):
    _, program = attentions(attend)
    with pytest.raises(MatchError, match=r"0 attention blocks have a known form, 1 do not.*%softmax: "):
        canonicalize(toy, program)
