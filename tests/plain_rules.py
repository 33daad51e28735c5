"""Rankings of visual tokens, written from their definitions in double precision on the model's own tensors."""

import copy
import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from conversations import IMAGE, batch, unrouted_model

from reroute_fx import AttentionRule, LatticeRule, UnionRule, ValueRule


@dataclass
class PlainLayer:
    """What a layer of the unrouted model makes of one row.

    Attributes:
        attention: with rotary positions, causal, ``[H, S, S]``.
        query, keys, values: without rotary positions, ``[H, S, D]`` and ``[Hkv, S, D]``.
    """

    attention: torch.Tensor
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


@torch.no_grad()
def plain_layers(family, prompt):
    """The layers of the unrouted model on a prompt."""
    model = copy.deepcopy(unrouted_model(family)).double()
    model.set_attn_implementation("eager")
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in batch(family, prompt).items()}
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    layers = []
    stack = zip(model.get_decoder().layers, output.hidden_states, output.attentions, strict=False)
    for layer, hidden, attention in stack:
        normed, attend = layer.input_layernorm(hidden[0]), layer.self_attn
        projected = [
            project(normed).view(len(normed), -1, attend.head_dim).transpose(0, 1)
            for project in (attend.q_proj, attend.k_proj, attend.v_proj)
        ]
        layers.append(PlainLayer(attention[0], *projected))
    return layers


@dataclass
class PlainTokens:
    """The tokens of one row.

    Attributes:
        visual: places of the visual tokens.
        text: places of the text behind the last picture.
        cells: row and column of each visual token.
        pools: number of the pool of each.
    """

    visual: list[int]
    text: list[int]
    cells: list[tuple[int, int]]
    pools: list[int]


def plain_tokens(ids, grids, by_image):
    """Args:
    ids: of a row without padding.
    grids: rows and columns of each of its pictures.
    by_image: whether each picture is a pool.
    """
    visual = [place for place, token in enumerate(ids) if token == IMAGE]
    cells = [(i, j) for height, width in grids for i in range(height) for j in range(width)]
    numbers = [number for number, (height, width) in enumerate(grids) for _ in range(height * width)]
    text = list(range(visual[-1] + 1, len(ids))) if visual else [len(ids) - 1]
    return PlainTokens(visual, text, cells, numbers if by_image else [0] * len(visual))


def scores_of(rule, layer, tokens, keep):
    """Score of each visual token of a row, ``[n]``; `keep` says how many stay of each pool."""
    match rule:
        case AttentionRule():
            return _by_attention(rule, layer, tokens)
        case ValueRule():
            values = layer.values
            logits = values[:, tokens.text] @ values[:, tokens.visual].transpose(1, 2)
            return (logits / math.sqrt(values.shape[-1])).softmax(-1).mean((0, 1))
        case LatticeRule():
            return torch.tensor([_lattice(rule, *cell) for cell in tokens.cells], dtype=torch.float64)
        case UnionRule():
            return _union(rule, layer, tokens, keep)
    raise TypeError(rule)


def _by_attention(rule, layer, tokens):
    asked = tokens.text if rule.queries == "text" else tokens.text[-1:]
    heads = list(rule.heads) or list(range(len(layer.query)))
    rows = []
    for head in heads:
        for place in asked:
            if rule.rotary:
                row = layer.attention[head, place]
            else:
                key = layer.keys[head * len(layer.keys) // len(layer.query), : place + 1]
                row = (key @ layer.query[head, place] / math.sqrt(key.shape[-1])).softmax(-1)
            row = row[tokens.visual]
            rows.append(row / row.sum() if rule.among == "visual" else row)
    return torch.stack(rows).mean(0)


def bayer(levels):
    """Bayer's matrix of ``2^levels`` rows, built from quarters."""
    if not levels:
        return torch.zeros(1, 1, dtype=torch.int64)
    quarter = 4 * bayer(levels - 1)
    upper = torch.cat([quarter, quarter + 2], dim=1)
    return torch.cat([upper, torch.cat([quarter + 3, quarter + 1], dim=1)])


MATRIX = bayer(4)


def _lattice(rule, row, column):
    down, across = row - rule.shift[0], column - rule.shift[1]
    if down % rule.stride or across % rule.stride:
        return 1 - MATRIX[row, column].item() / MATRIX.numel()
    return 2 - MATRIX[down // rule.stride, across // rule.stride].item() / MATRIX.numel()


def best_of(scores, pools, keep):
    """The best of each pool: from the highest score down, equal ones by place."""
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i].item(), i))
    return {i for pool, k in keep.items() for i in [j for j in ranked if pools[j] == pool][:k]}


def _union(rule, layer, tokens, keep):
    share = Fraction(rule.share).limit_denominator(1000)
    quota = {pool: math.floor(share * k + Fraction(1, 2)) for pool, k in keep.items()}
    chosen = best_of(scores_of(rule.first, layer, tokens, keep), tokens.pools, quota)
    then = scores_of(rule.then, layer, tokens, keep)
    return torch.tensor([then.max() + 1 if i in chosen else then[i] for i in range(len(then))])
