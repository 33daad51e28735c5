"""A small hand-written decoder, its exports, and the checks that every pass test makes."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from reroute_fx.passes import (
    CanonicalizeAttention,
    FindLayers,
    ProveCausal,
    RemoveNoOps,
    run_passes,
    to_program,
)

WIDTH, HEADS, HEAD_DIM = 32, 4, 8


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(WIDTH))

    def forward(self, hidden):
        return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6) * self.weight


def rotate(tensor, cos, sin):
    first, second = tensor.chunk(2, dim=-1)
    return tensor * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)


def causal_mask(padding, hidden):
    """Boolean ``[B, 1, S, S]`` or ``[1, 1, S, S]``: key <= query, and-ed with the padding."""
    places = torch.arange(hidden.shape[1], device=hidden.device)
    mask = places[None, None, None, :] <= places[None, None, :, None]
    return mask if padding is None else mask & padding.to(torch.bool)[:, None, None, :]


def additive(mask_function):
    def mask(padding, hidden):
        return torch.where(mask_function(padding, hidden), 0.0, torch.finfo(hidden.dtype).min)

    return mask


def head_repeat(tensor, times):
    batch, heads, length, width = tensor.shape
    if times == 1:
        return tensor
    return tensor[:, :, None].expand(batch, heads, times, length, width).reshape(batch, heads * times, length, width)


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
        self.key = nn.Linear(WIDTH, kv_heads * HEAD_DIM, bias=True)
        self.value = nn.Linear(WIDTH, value_heads * HEAD_DIM, bias=False)
        self.output = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.attend, self.repeat, self.repeat_values = attend, repeat, repeat_values
        self.kv_heads, self.value_heads, self.parallel = kv_heads, value_heads, parallel
        with torch.no_grad():
            # Sharper than the default initialisation, so that scores and layers differ from each other.
            self.query.weight.mul_(3)
            self.key.weight.mul_(3)

    def heads(self, projected):
        return projected.view(*projected.shape[:2], -1, HEAD_DIM).transpose(1, 2)

    def attention(self, hidden, memory, cos, sin, mask):
        query = rotate(self.heads(self.query(hidden)), cos, sin)
        key = rotate(self.heads(self.key(memory)), cos, sin)
        value = self.heads(self.value(memory))
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


class Decoder(nn.Module):
    """Pre-norm decoder.

    `attend`, `mask` and `repeat` are how attention is spelled; `odd_layer` attends by `odd_attend` instead.
    """

    def __init__(
        self,
        layers=3,
        kv_heads=HEADS,
        value_heads=None,
        attend=sdpa,
        mask=causal_mask,
        repeat=head_repeat,
        repeat_values=None,
        parallel=False,
        odd_layer=None,
        odd_attend=None,
        seed=0,
    ):
        super().__init__()
        torch.manual_seed(seed)
        self.mask = mask
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

    def rotary(self, position_ids):
        angles = position_ids.unsqueeze(-1) * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    def run_layers(self, hidden, cos, sin, mask):
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, mask)
        return hidden

    def forward(self, inputs_embeds, position_ids, attention_mask=None):
        cos, sin = self.rotary(position_ids)
        mask = self.mask(attention_mask, inputs_embeds)
        return self.norm(self.run_layers(inputs_embeds, cos, sin, mask))


def make_inputs(batch=2, length=64, seed=1, padding=False, dtype=torch.float32):
    """Positions that are neither 0..S-1 nor the same in each row, so that renumbering shows."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.arange(length) * 2 + 3 * torch.arange(batch)[:, None]
    inputs = {
        "inputs_embeds": torch.randn(batch, length, WIDTH, generator=generator).to(dtype),
        "position_ids": positions,
    }
    if padding:
        inputs["attention_mask"] = torch.ones(batch, length, dtype=torch.long)
    return inputs


def export(model, inputs=None, padding=False, **dynamic):
    """Export with a symbolic batch and length; `dynamic` gives the dimensions of further inputs."""
    sizes = {0: Dim("batch", min=1), 1: Dim("length", min=1)}
    inputs = inputs or make_inputs(padding=padding)
    shapes = {name: dynamic.get(name, sizes) for name in inputs}
    with torch.no_grad():
        return torch.export.export(model.eval(), (), inputs, dynamic_shapes=shapes)


def find_passes(num_layers=None):
    return [RemoveNoOps(), CanonicalizeAttention(), ProveCausal(), FindLayers(num_layers)]


def call(program, inputs, **more):
    """What a program returns, as a plain value when it holds for the original outputs only."""
    names = {spec.arg.name for spec in program.graph_signature.input_specs}
    with torch.no_grad():
        return program.module(check_guards=False)(**{k: v for k, v in (inputs | more).items() if k in names})


def noise(model, inputs):
    """Largest float32 rounding error in the output of `model`."""
    exact = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        rounded = model(**inputs)
        precise = model.double()(**exact)
        model.float()
    return (rounded - precise).abs().max().item()


def assert_same_numbers(program, model, **sizes):
    """The edited program agrees with the eager module, up to a few times the rounding error of the latter."""
    padding = "attention_mask" in program.module(check_guards=False).forward.__code__.co_varnames
    del padding
