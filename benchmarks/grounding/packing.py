"""Several questions about one picture in one sequence: the picture's tokens are computed once for all of them.

A sequence is ``[prefix | row 1 | row 2 | ...]``; rows are equally long, and some questions are in each. A question sees
the prefix and itself, at the positions that it has when it is asked alone, so that training on a packed sequence is
training on its questions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

PACKED = "packed_questions"
IGNORED = -100
Turn = tuple[list[int], list[int]]
"""A question and its answer in tokens."""


@dataclass(frozen=True)
class Packed:
    """A batch of pictures with as many rows of questions each.

    Attributes:
        pictures: `[B, N, d]`, as the decoder reads them.
        input_ids: `[B, P + Q * R]`: prefix, then rows padded to the same length.
        position_ids: `[B, P + Q * R]`.
        labels: `[B, P + Q * R]`, what follows each token where that is part of an answer, else `IGNORED`.
        mask: `[B, 1, Q, R, R]` bool, which tokens of its row a token sees.
        prefix: P.
    """

    pictures: Tensor
    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    mask: Tensor
    prefix: int


def lay_out(turns: Sequence[Turn], rows: int, length: int, pad: int) -> tuple[list[list[int]], ...]:
    """Put turns into rows, each into the first that has room for it; those that fit nowhere are left out.

    Returns:
        Tokens; what follows each token where that is part of an answer, else `IGNORED`; and which turn of the row each
        token belongs to. Padding is a turn of its own.
    """
    ids: list[list[int]] = [[] for _ in range(rows)]
    labels: list[list[int]] = [[] for _ in range(rows)]
    places: list[list[int]] = [[] for _ in range(rows)]
    for asked, answer in turns:
        size = len(asked) + len(answer)
        row = next((i for i in range(rows) if len(ids[i]) + size <= length), None)
        if row is not None:
            places[row] += [places[row][-1] + 1 if places[row] else 0] * size
            ids[row] += asked + answer
            labels[row] += [IGNORED] * (len(asked) - 1) + answer + [IGNORED]
    for row in range(rows):
        rest = length - len(ids[row])
        ids[row] += [pad] * rest
        labels[row] += [IGNORED] * rest
        places[row] += [rows * length] * rest
    return ids, labels, places


def pack(pictures: Tensor, prefix: list[int], questions: Tensor, labels: Tensor, turns: Tensor) -> Packed:
    """Pack, for each picture, what `lay_out` returns for its questions: all `[B, Q, R]`."""
    rows, _, length = questions.shape
    before = torch.tensor(prefix).expand(rows, -1)
    same = turns[..., None] == turns[..., None, :]  # [B, Q, R, R]
    own = torch.arange(length) - same.int().argmax(-1)  # [B, Q, R]
    return Packed(
        pictures,
        torch.cat([before, questions.flatten(1).long()], dim=1),
        torch.cat([torch.arange(len(prefix)).expand(rows, -1), len(prefix) + own.flatten(1)], dim=1),
        torch.cat([torch.full_like(before, IGNORED), labels.flatten(1).long()], dim=1),
        same.tril()[:, None],
        len(prefix),
    )


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packed_prefix: int,
    packed_mask: Tensor,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention over `[B, H, P + Q * R, head_dim]`, every question blind to the others."""
    length = packed_mask.shape[-1]
    cut = [packed_prefix, query.shape[2] - packed_prefix]
    (q0, q1), (k0, k1), (v0, v1) = (t.split(cut, dim=2) for t in (query, key, value))
    # On CPU the kernel of scaled_dot_product_attention takes ten times as long for the gradients of 150 tokens.
    later = torch.ones(packed_prefix, packed_prefix, dtype=torch.bool).triu(1)
    of_before = (q0 @ k0.transpose(-1, -2) * scaling).masked_fill(later, float("-inf"))  # [B, H, P, P]
    seen = of_before.softmax(dim=-1, dtype=torch.float32).to(q0.dtype) @ v0
    q, k, v = (t.unflatten(2, (-1, length)) for t in (q1, k1, v1))  # [B, H, Q, R, head_dim]
    of_prefix = (q1 @ k0.transpose(-1, -2)).unflatten(2, (-1, length)).float() * scaling  # [B, H, Q, R, P]
    of_own = (q @ k.transpose(-1, -2)).float() * scaling  # [B, H, Q, R, R]
    of_own = of_own.masked_fill(~packed_mask, float("-inf"))
    # A softmax over both without joining them, which would copy them twice.
    highest = torch.maximum(of_prefix.amax(-1, keepdim=True), of_own.amax(-1, keepdim=True)).detach()
    to_prefix, to_own = (of_prefix - highest).exp(), (of_own - highest).exp()
    whole = to_prefix.sum(-1, keepdim=True) + to_own.sum(-1, keepdim=True)
    asked = (to_prefix.to(q.dtype).flatten(2, 3) @ v0).unflatten(2, (-1, length)) + to_own.to(q.dtype) @ v
    asked = (asked / whole).to(q.dtype).flatten(2, 3)
    return torch.cat([seen, asked], dim=2).transpose(1, 2), None


AttentionInterface.register(PACKED, packed_attention)
