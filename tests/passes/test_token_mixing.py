"""Layers in which something other than attention moves information between tokens are refused."""

import pytest
import torch
from torch import nn
from torch.export import Dim

from reroute_fx.passes import (
    AttendToCache,
    CanonicalizeAttention,
    FindLayers,
    MatchError,
    ProveCausal,
    RemoveNoOps,
    run_passes,
)

WIDTH, HEADS = 16, 2
FIND = [RemoveNoOps(), CanonicalizeAttention(), ProveCausal(), FindLayers(2)]


class Decoder(nn.Module):
    """Two plain layers; `mix` is applied to the normalised stream of the second before its feed-forward map."""

    def __init__(self, mix):
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.feed_forward = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.convolution = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.mix = mix

    def forward(self, inputs_embeds):
        stream = inputs_embeds
        for index in range(2):
            batch, length, _ = stream.shape
            heads = self.projections[index](stream).view(batch, length, HEADS, -1).transpose(1, 2)
            query, key, value = heads.chunk(3, dim=-1)
            attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            stream = stream + attended.transpose(1, 2).reshape(batch, length, -1)
            inner = self.mix(self, stream) if index == 1 else stream
            stream = stream + self.feed_forward[index](inner)
        return stream


def find(mix):
    dims = {"inputs_embeds": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    program = torch.export.export(Decoder(mix), (torch.randn(2, 64, WIDTH),), dynamic_shapes=dims)
    return run_passes(program, FIND)


TOKENWISE = {
    "nothing": lambda _, x: x,
    "softmax over features": lambda _, x: x.softmax(-1),
    "mean over features": lambda _, x: x - x.mean(-1, keepdim=True),
    "halves of the features": lambda _, x: torch.cat((-x[..., 8:], x[..., :8]), dim=-1),
    "sum over features": lambda _, x: x * x.cumsum(-1),
    "product with a weight": lambda m, x: x @ m.feed_forward[0].weight,
}
MIXING = {
    "running sum": lambda _, x: x.cumsum(1),
    "softmax over tokens": lambda _, x: x.softmax(1),
    "mean over tokens": lambda _, x: x - x.mean(1, keepdim=True),
    "convolution": lambda m, x: m.convolution(x.transpose(1, 2)).transpose(1, 2),
    "reversal": lambda _, x: x.flip(1),
    "shift": lambda _, x: nn.functional.pad(x, (0, 0, 1, 0))[:, :-1],
    "first token": lambda _, x: x + x[:, :1],
    "product over tokens": lambda _, x: (x @ x.transpose(1, 2)) @ x,
    "sorted tokens": lambda _, x: x.sort(dim=1).values,
    "einsum over tokens": lambda _, x: torch.einsum("bsd,bte->bse", x, x),
    "shift that keeps the length": lambda _, x: nn.functional.pad(x, (0, 0, 1, -1)),
    "halves of the tokens": lambda _, x: torch.cat((x[:, 1:], x[:, :1]), dim=1),
    "product with a bias": lambda _, x: x @ torch.baddbmm(x.new_ones(1), x.transpose(1, 2), x),
    "group norm": lambda _, x: nn.functional.group_norm(x.transpose(1, 2), 2).transpose(1, 2),
    "instance norm": lambda _, x: nn.functional.instance_norm(x.transpose(1, 2)).transpose(1, 2),
    "pooling": lambda _, x: nn.functional.avg_pool1d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2),
    "sums at places": lambda _, x: x.scatter_add(1, torch.zeros_like(x, dtype=torch.int64), x),
    "running sum of rows": lambda _, x: x.reshape(-1, WIDTH).cumsum(0).view(x.shape),
    "mean of rows": lambda _, x: (x.flatten(0, 1) - x.flatten(0, 1).mean(0)).view_as(x),
    "mean over the batch": lambda _, x: x - x.mean(0),
    "neighbours through a table": lambda _, x: (
        x + x.reshape(-1, WIDTH)[x.reshape(-1, WIDTH).argsort(0)[:, 0]].view_as(x)
    ),
}
COUNTING = {
    "root of the length": (lambda _, x: x * x.shape[1] ** 0.5, "mul"),
    "logarithm of the length": (lambda _, x: x * torch.full((), x.shape[1]).log(), "full"),
    "length itself": (lambda _, x: x / x.shape[1], "div"),
    "a fraction of it for each row": (lambda _, x: x + torch.full_like(x, x.shape[1] * 0.5), "full_like"),
}


@pytest.mark.parametrize("mix", TOKENWISE)
def test_tokenwise_layers_are_found(mix):
    graph, results = find(TOKENWISE[mix])
    assert len(graph.layers) == results[-1].matched == 2


@pytest.mark.parametrize("mix", MIXING)
def test_mixing_layers_are_refused(mix):
    with pytest.raises(MatchError, match=r"in layer 1 it lets tokens see each other \(aten\."):
        find(MIXING[mix])


@pytest.mark.parametrize("count", COUNTING)
def test_layers_that_compute_with_the_length_are_refused(count):
    mix, name = COUNTING[count]
    with pytest.raises(
        MatchError, match=rf"in layer 1 it computes with the number of tokens \(aten\.{name}\."
    ):
        find(mix)


def test_length_outside_of_the_layers_is_refused_for_what_follows_a_prompt():
    """Routed, the layers read the factor of the whole prompt; a call for one new token would compute its own."""

    class Scaled(Decoder):
        def forward(self, inputs_embeds):
            return super().forward(inputs_embeds * inputs_embeds.shape[1] ** 0.5)

    dims = {"inputs_embeds": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    scaled = Scaled(TOKENWISE["nothing"])
    program = torch.export.export(scaled, (torch.randn(2, 64, WIDTH),), dynamic_shapes=dims)
    graph, _ = run_passes(program, FIND)
    assert len(graph.layers) == 2
    with pytest.raises(MatchError, match=r"computes with the number of tokens \(aten\.mul\."):
        run_passes(program, [*FIND, AttendToCache()])
