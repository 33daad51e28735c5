"""A small hand-written decoder, its exports, and the checks that several pass tests share."""

import copy
import math
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import nn
from torch.export import Dim

from reroute_fx.passes import CanonicalizeAttention, FindLayers, ProveCausal, RemoveNoOps
from reroute_fx.selection.row_plan import plan_rows

WIDTH, HEADS, HEAD_DIM = 32, 4, 8


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(WIDTH))

    def forward(self, hidden):
        return F.rms_norm(hidden, (WIDTH,), self.weight, 1e-6)


def rotate(tensor, cos, sin):
    first, second = tensor.chunk(2, dim=-1)
    return tensor * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)


def causal_mask(padding, hidden):
    """Boolean ``[B, 1, S, S]`` or ``[1, 1, S, S]``: key <= query, and-ed with the padding."""
    places = torch.arange(hidden.shape[1], device=hidden.device)
    mask = places[None, None, None, :] <= places[None, None, :, None]
    return mask if padding is None else mask & padding.to(torch.bool)[:, None, None, :]


def additive_mask(padding, hidden):
    mask = torch.where(causal_mask(padding, hidden), 0.0, torch.finfo(torch.float32).min)
    return mask.to(hidden.dtype)


def no_mask(padding, hidden):
    return None


def repeat_heads(tensor, times):
    if times == 1:
        return tensor
    batch, heads, length, width = tensor.shape
    wide = tensor[:, :, None].expand(batch, heads, times, length, width)
    return wide.reshape(batch, heads * times, length, width)


def sdpa(query, key, value, mask):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def sdpa_causal(query, key, value, mask):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def eager(query, key, value, mask):
    logits = torch.matmul(query, key.transpose(2, 3)) * HEAD_DIM**-0.5 + mask
    return torch.matmul(logits.softmax(-1, dtype=torch.float32).to(query.dtype), value)


class Layer(nn.Module):
    def __init__(self, kv_heads, value_heads, attend, repeat, repeat_values, parallel):
        super().__init__()
        self.input_norm, self.output_norm = Norm(), Norm()
        self.query = nn.Linear(WIDTH, HEADS * HEAD_DIM, bias=False)
        self.key = nn.Linear(WIDTH, kv_heads * HEAD_DIM)
        self.value = nn.Linear(WIDTH, value_heads * HEAD_DIM, bias=False)
        self.output = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.attend, self.repeat, self.repeat_values = attend, repeat, repeat_values
        self.kv_heads, self.value_heads, self.parallel = kv_heads, value_heads, parallel
        with torch.no_grad():
            # Sharper attention than the default initialisation gives, so that scores differ.
            self.query.weight.mul_(3)
            self.key.weight.mul_(3)

    def split_heads(self, projected):
        return projected.view(*projected.shape[:2], -1, HEAD_DIM).transpose(1, 2)

    def attention(self, hidden, memory, cos, sin, mask):
        """Rows of `hidden` attend to rows of `memory`."""
        query = rotate(self.split_heads(self.query(hidden)), cos, sin)
        key = rotate(self.split_heads(self.key(memory)), cos, sin)
        value = self.split_heads(self.value(memory))
        key = self.repeat(key, HEADS // self.kv_heads)
        value = self.repeat_values(value, HEADS // self.value_heads)
        result = self.attend(query, key, value, mask)
        return self.output(result.transpose(1, 2).reshape(*hidden.shape[:2], HEADS * HEAD_DIM))

    def mlp(self, hidden):
        return self.down(F.silu(self.gate(hidden)) * self.up(hidden))

    def forward(self, hidden, cos, sin, mask):
        normed = self.input_norm(hidden)
        attention = self.attention(normed, normed, cos, sin, mask)
        if self.parallel:
            return attention + self.mlp(normed) + hidden
        hidden = hidden + attention
        return hidden + self.mlp(self.output_norm(hidden))


def rotary(decoder, position_ids):
    angles = position_ids.unsqueeze(-1) * decoder.frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def run_layers(decoder, hidden, cos, sin, mask):
    for layer in decoder.layers:
        hidden = layer(hidden, cos, sin, mask)
    return hidden


class Decoder(nn.Module):
    """Pre-norm decoder.

    `attend`, `mask` and `repeat` are how attention is spelled, `run` and `turn` replace the methods that run the
    layers and compute cos and sin. Layer `odd_layer` attends with `odd_attend` instead.
    """

    def __init__(
        self,
        layers=2,
        kv_heads=HEADS,
        value_heads=None,
        attend=sdpa,
        mask=causal_mask,
        repeat=repeat_heads,
        repeat_values=None,
        parallel=False,
        odd_layer=None,
        odd_attend=None,
        run=None,
        turn=None,
    ):
        super().__init__()
        torch.manual_seed(0)
        self.mask, self.run, self.turn = mask, run or run_layers, turn or rotary
        self.layers = nn.ModuleList(
            Layer(
                kv_heads,
                value_heads or kv_heads,
                odd_attend if index == odd_layer else attend,
                repeat,
                repeat_values or repeat,
                parallel,
            )
            for index in range(layers)
        )
        self.norm = Norm()
        self.register_buffer("frequencies", 1000.0 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))

    def forward(self, inputs_embeds, position_ids, attention_mask=None):
        cos, sin = self.turn(self, position_ids)
        mask = self.mask(attention_mask, inputs_embeds)
        return self.norm(self.run(self, inputs_embeds, cos, sin, mask))


class Blocks(nn.Module):
    """Attentions alone on a residual stream, one for each function of `attends`, under one mask or one each."""

    def __init__(self, attends, mask=causal_mask, kv_heads=HEADS):
        super().__init__()
        torch.manual_seed(0)
        self.attends = attends
        self.masks = [mask] * len(attends) if callable(mask) else mask
        self.sizes = [HEADS * HEAD_DIM, kv_heads * HEAD_DIM, kv_heads * HEAD_DIM]
        self.project = nn.Linear(WIDTH, sum(self.sizes))

    def forward(self, inputs_embeds, attention_mask=None):
        hidden = inputs_embeds
        for attend, mask in zip(self.attends, self.masks, strict=True):
            projected = self.project(hidden).split(self.sizes, dim=-1)
            heads = [x.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for x in projected]
            result = attend(*heads, mask(attention_mask, inputs_embeds))
            hidden = hidden + result.transpose(1, 2).flatten(2)
        return hidden


def make_inputs(batch=2, length=64, padding=False, seed=1):
    """Positions are neither 0..S-1 nor the same in each row, so that renumbering shows."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "inputs_embeds": torch.randn(batch, length, WIDTH, generator=generator),
        "position_ids": torch.arange(length) * 2 + 3 * torch.arange(batch)[:, None],
    }
    if padding:
        inputs["attention_mask"] = torch.ones(batch, length, dtype=torch.long)
    return inputs


def make_visual(lengths, images, seed=2):
    """For each row the positions of each image's tokens, ascending: `images` has their numbers.

    They are interleaved with text and different in each row; first and last token are text.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length, counts in zip(lengths, images, strict=True):
        between = torch.randperm(max(0, length - 2), generator=generator) + 1
        tokens = between[: sum(counts)].sort().values
        assert len(tokens) == sum(counts)
        rows.append([image.tolist() for image in tokens.split(list(counts))])
    return rows


def make_prompt(config, lengths, images, places=None, garbage=5, padding=False):
    """Inputs of a routed program. What lies behind a row's tokens grows with `garbage`."""
    places = places or max(lengths)
    inputs = make_inputs(len(lengths), places, padding)
    is_padding = torch.arange(places) >= torch.tensor(lengths)[:, None]
    inputs["inputs_embeds"][is_padding] *= garbage
    inputs["position_ids"][is_padding] = garbage
    is_visual = torch.zeros(len(lengths), places, dtype=torch.bool)
    for row, tokens in zip(is_visual, make_visual(lengths, images), strict=True):
        row[[*chain(*tokens)]] = True
    return inputs | plan_rows(config, is_visual, lengths, images).inputs


def export(model, inputs=None, padding=False, **dynamic):
    """Export with a symbolic batch and length; `dynamic` gives the dimensions of special inputs."""
    sizes = {0: Dim("batch", min=1), 1: Dim("length", min=1)}
    inputs = inputs or make_inputs(padding=padding)
    shapes = {name: dynamic.get(name, sizes) for name in inputs}
    with torch.no_grad():
        return torch.export.export(model.eval(), (), inputs, dynamic_shapes=shapes)


def call(program, inputs):
    """Run a program on those of `inputs` that it takes."""
    taken = {name: tensor for name, tensor in inputs.items() if name in program.graph_signature.user_inputs}
    with torch.no_grad():
        return program.module(check_guards=False)(**taken)


def passes(count, num_layers=None):
    """The first `count` passes of the pipeline."""
    return [RemoveNoOps(), CanonicalizeAttention(), ProveCausal(), FindLayers(num_layers)][:count]


def operators(graph, *packets):
    """Calls of `packets` in an fx graph, in order."""
    return [n for n in graph.nodes if getattr(n.target, "overloadpacket", None) in packets]


def in_double(tensors):
    return {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}


def double(model):
    return copy.deepcopy(model).double()


def tolerance(rounded, exact):
    """A few times the error that float32 makes in a reference, or a few units in its last place."""
    noise = (rounded - exact).abs().max().item()
    assert noise < 1e-4, "the reference itself is not accurate"
    return 8 * max(noise, torch.finfo(torch.float32).eps * exact.abs().max().item())


def assert_agrees(program, model, inputs):
    """The output of an edited program is that of `model`, up to the rounding error of float32."""
    with torch.no_grad():
        rounded = model(**inputs)
        exact = double(model)(**in_double(inputs))
    result = call(program, inputs)["output"]
    assert result.shape == exact.shape
    assert (result - exact).abs().max().item() <= tolerance(rounded, exact)


def assert_exports_again(program, inputs, other):
    """Exported from `inputs` once more, the program gives and writes the same at the sizes of `other`."""
    names = program.graph_signature.user_inputs
    sample, first, second = ({n: t[n].clone() for n in names} for t in (inputs, other, other))
    dynamic = {
        name: {dim: Dim.DYNAMIC for dim, size in enumerate(sample[name].shape) if size != tensor.shape[dim]}
        for name, tensor in first.items()
    }
    with torch.no_grad():
        again = torch.export.export(program.module(check_guards=False), (), sample, dynamic_shapes=dynamic)
        results = pytree.tree_leaves(again.module()(**first))
    expected = pytree.tree_leaves(call(program, second))
    assert len(results) == len(expected) > 0
    for result, wanted in zip([*results, *first.values()], [*expected, *second.values()], strict=True):
        assert torch.equal(result, wanted)


def normalised(rows, norm):
    return rows / (rows.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


def turned(rows, angles):
    """Rotary embedding of ``[S, H, D]`` as a rotation of each pair (i, i + D/2)."""
    half = rows.shape[-1] // 2
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    low, high = rows[..., :half], rows[..., half:]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def heads_of(rows, linear):
    return F.linear(rows, linear.weight, linear.bias).view(rows.shape[0], -1, HEAD_DIM)


def layer_by_hand(layer, rows, angles, cached=None):
    """A layer on the rows of one sequence, after `cached` keys and values; with the new ones, ``[S, H, D]``."""
    normed = normalised(rows, layer.input_norm)
    query, new_key = (turned(heads_of(normed, linear), angles) for linear in (layer.query, layer.key))
    new_value = heads_of(normed, layer.value)
    key, value = new_key, new_value
    if cached:
        key, value = (torch.cat(pair) for pair in zip(cached, (new_key, new_value), strict=True))
    later = torch.ones(len(rows), len(key), dtype=torch.bool).triu(1 + len(key) - len(rows))
    mixed = torch.zeros_like(query)
    for head in range(query.shape[1]):
        shared = head // (query.shape[1] // key.shape[1])
        logits = query[:, head] @ key[:, shared].T / math.sqrt(HEAD_DIM)
        mixed[:, head] = logits.masked_fill(later, -math.inf).softmax(-1) @ value[:, shared]
    attention = F.linear(mixed.flatten(1), layer.output.weight)
    source = normed if layer.parallel else normalised(rows + attention, layer.output_norm)
    gate, up = F.linear(source, layer.gate.weight), F.linear(source, layer.up.weight)
    result = rows + attention + F.linear(gate * gate.sigmoid() * up, layer.down.weight)
    return result, new_key, new_value


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    """All tensors here are tiny."""


@pytest.fixture(scope="session")
def toy():
    """What the tests build decoders from; test modules can't import this file."""
    names = (
        "Blocks, Decoder, Layer, WIDTH, HEADS, HEAD_DIM, additive_mask, assert_agrees, assert_exports_again, call, "
        "causal_mask, double, eager, export, heads_of, in_double, layer_by_hand, make_inputs, make_prompt, "
        "make_visual, no_mask, normalised, operators, passes, repeat_heads, rotary, rotate, run_layers, sdpa, "
        "sdpa_causal, tolerance, turned"
    )
    return SimpleNamespace(**{name: globals()[name] for name in names.split(", ")})


@pytest.fixture(scope="session")
def exported():
    """A function ``(padding=False, **options) -> (decoder, exported program)`` that exports each once."""
    cache = {}

    def get(padding=False, **options):
        key = (padding, tuple(sorted(options.items(), key=lambda item: item[0])))
        if key not in cache:
            model = Decoder(**options)
            cache[key] = model, export(model, padding=padding)
        return cache[key]

    return get
