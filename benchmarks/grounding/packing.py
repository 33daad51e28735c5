"""Several questions about one picture in one sequence: the picture's tokens are computed once for all of them.

A sequence is ``[prefix | question 1 | question 2 | ...]``. Each question sees the prefix and itself, at the positions
that it has when it is asked alone, so that training on a packed sequence is training on its questions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

PACKED = "packed_questions"
IGNORED = -100


@dataclass(frozen=True)
class Packed:
    """A batch of pictures with as many questions each.

    Attributes:
        features: `[B, N, d]`, what the tower says of the pictures.
        input_ids: `[B, P + Q * R]`: prefix, then questions padded to the same length.
        position_ids: `[B, P + Q * R]`.
        labels: `[B, P + Q * R]`, what follows each token where that is part of an answer, else `IGNORED`.
        prefix: P.
        length: R.
    """

    features: Tensor
    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    prefix: int
    length: int


def lay_out(
    turns: Sequence[tuple[list[int], list[int]]], length: int, pad: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Questions and answers in tokens padded to `length`; what follows each token where that is part of an answer."""
    ids, labels = [], []
    for asked, answer in turns:
        rest = length - len(asked) - len(answer)
        ids.append([*asked, *answer, *[pad] * rest])
        labels.append([IGNORED] * (len(asked) - 1) + answer + [IGNORED] * (rest + 1))
    return ids, labels


def pack(features: Tensor, prefix: list[int], questions: Tensor, labels: Tensor) -> Packed:
    """Pack, for each picture, what `lay_out` returns for its questions: both `[B, Q, R]`."""
    rows, count, length = questions.shape
    before = torch.tensor(prefix).expand(rows, -1)
    own = torch.arange(len(prefix), len(prefix) + length).repeat(count)
    return Packed(
        features,
        torch.cat([before, questions.flatten(1).long()], dim=1),
        torch.cat([torch.arange(len(prefix)), own]).expand(rows, -1),
        torch.cat([torch.full_like(before, IGNORED), labels.flatten(1).long()], dim=1),
        len(prefix),
        length,
    )


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packed_lengths: tuple[int, int],
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention over `[B, H, P + Q * R, head_dim]`, every question blind to the others."""
    prefix, length = packed_lengths
    cut = [prefix, query.shape[2] - prefix]
    (q0, q1), (k0, k1), (v0, v1) = (t.split(cut, dim=2) for t in (query, key, value))
    seen = F.scaled_dot_product_attention(q0, k0, v0, is_causal=True, scale=scaling)
    q, k, v = (t.unflatten(2, (-1, length)) for t in (q1, k1, v1))  # [B, H, Q, R, head_dim]
    of_prefix = (q1 @ k0.transpose(-1, -2)).unflatten(2, (-1, length))  # [B, H, Q, R, P]
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    of_own = (q @ k.transpose(-1, -2)).masked_fill(later, float("-inf"))  # [B, H, Q, R, R]
    weights = (
        (torch.cat([of_prefix, of_own], dim=-1) * scaling).softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    )
    to_prefix, to_own = weights.split([prefix, length], dim=-1)
    asked = to_prefix.flatten(2, 3) @ v0 + (to_own @ v).flatten(2, 3)
    return torch.cat([seen, asked], dim=2).transpose(1, 2), None


AttentionInterface.register(PACKED, packed_attention)
