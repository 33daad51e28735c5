"""``reroute::visual_scores`` as Triton kernels: one pass over the keys, split among programs.

The first kernel computes the last row's logits and, for each split of the keys, their maximum and the sum
of exponentials (online softmax). The second joins the splits and averages over heads at the visual
positions. The largest thing stored is ``[B, H, S]`` float32, never an S x S map.
"""

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

BLOCK_KEYS = 64
"""Keys of a split."""
BLOCK_TOKENS = 16
"""Visual tokens that one program of the second kernel averages."""
BLOCK_HEADS = 32
"""Heads that it reads at once, so that it waits for memory once and not once for each."""
BLOCK_SPLITS = 32
"""Splits that it joins at once."""


@triton.jit
def _split_logits(
    query,
    keys,
    lengths,
    logits,
    maxima,
    sums,
    kv_heads,
    length,
    splits,
    width,
    batch_stride,
    head_stride,
    key_stride,
    scale,
    GROUP: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Logits of one split of the keys of one key-value head, for each query head that shares it."""
    split = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    row, kv_head = pair // kv_heads, pair % kv_heads
    tokens = tl.load(lengths + row)
    key = split * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    column = tl.arange(0, BLOCK_WIDTH)
    block = tl.load(
        keys + row * batch_stride + kv_head * head_stride + key.to(tl.int64)[:, None] * key_stride + column,
        mask=(key < tokens)[:, None] & (column < width),
        other=0,
    ).to(tl.float32)
    for member in tl.static_range(GROUP):
        head = pair * GROUP + member  # [B * H], in which the heads of a group follow each other
        q = tl.load(query + head * width + column, mask=column < width, other=0).to(tl.float32)
        logit = tl.sum(block * q[None, :], axis=1) * scale
        logit = tl.where(key < tokens, logit, float("-inf"))
        tl.store(logits + head * length + key, logit, mask=key < length)
        maximum = tl.max(logit, axis=0)
        # A split that lies behind the row's last token has no maximum; its sum must come out as 0, not NaN.
        total = tl.sum(tl.exp(logit - tl.maximum(maximum, -3.0e38)), axis=0)
        tl.store(maxima + head * splits + split, maximum)
        tl.store(sums + head * splits + split, total)


@triton.jit
def _join_splits(maxima, sums, is_head, splits, BLOCK_SPLITS: tl.constexpr):
    """Maximum and sum of exponentials over all splits of each head; 0 and 1 of what is no head.

    `maxima` and `sums` point at the first split of each head, which has a token always.
    """
    maximum = tl.load(maxima, mask=is_head, other=0.0)
    total = tl.where(is_head, 0.0, 1.0)
    for first in range(0, splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        is_split = is_head[:, None] & (split < splits)[None, :]
        of_split = tl.load(maxima[:, None] + split[None, :], mask=is_split, other=float("-inf"))
        partial = tl.load(sums[:, None] + split[None, :], mask=is_split, other=0.0)
        higher = tl.maximum(maximum, tl.max(of_split, axis=1))
        total *= tl.exp(maximum - higher)
        total += tl.sum(partial * tl.exp(of_split - higher[:, None]), axis=1)
        maximum = higher
    return maximum, total


@triton.jit
def _mean_over_heads(
    logits,
    maxima,
    sums,
    visual_index,
    lengths,
    scores,
    heads,
    length,
    splits,
    tokens,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Softmax over the whole row at the visual positions, averaged over heads, a block of them at a time."""
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    row = tl.program_id(1).to(tl.int64)
    index = tl.load(visual_index + row * tokens + token, mask=token < tokens, other=length)
    is_token = index < tl.load(lengths + row)
    mean = tl.zeros([BLOCK_TOKENS], dtype=tl.float32)
    for first in range(0, heads, BLOCK_HEADS):
        member = first + tl.arange(0, BLOCK_HEADS)
        is_head = member < heads
        head = row * heads + member
        maximum, total = _join_splits(
            maxima + head * splits, sums + head * splits, is_head, splits, BLOCK_SPLITS
        )
        place = head[:, None] * length + index[None, :]
        logit = tl.load(logits + place, mask=is_head[:, None] & is_token[None, :], other=float("-inf"))
        mean += tl.sum(tl.exp(logit - maximum[:, None]) / total[:, None], axis=0)
    score = tl.where(is_token, mean / heads, float("-inf"))
    tl.store(scores + row * tokens + token, score, mask=token < tokens)


@triton_op("reroute::visual_scores_triton", mutates_args={})
def visual_scores_triton(
    query: torch.Tensor, keys: torch.Tensor, visual_index: torch.Tensor, lengths: torch.Tensor, scale: float
) -> torch.Tensor:
    """See `reroute_fx.kernels.visual_scores`."""
    batch, heads, _, width = query.shape
    kv_heads, length = keys.shape[1], keys.shape[2]
    visual_index, lengths = visual_index.contiguous(), lengths.contiguous()
    if keys.stride(3) != 1:
        keys = keys.contiguous()
    splits = triton.cdiv(length, BLOCK_KEYS)
    logits = torch.empty((batch, heads, length), dtype=torch.float32, device=query.device)
    maxima = torch.empty((batch, heads, splits), dtype=torch.float32, device=query.device)
    sums = torch.empty_like(maxima)
    wrap_triton(_split_logits)[splits, batch * kv_heads](
        query.contiguous(),
        keys,
        lengths,
        logits,
        maxima,
        sums,
        kv_heads,
        length,
        splits,
        width,
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        scale,
        GROUP=heads // kv_heads,
        BLOCK_KEYS=BLOCK_KEYS,
        BLOCK_WIDTH=triton.next_power_of_2(width),
    )
    tokens = visual_index.shape[1]
    scores = torch.empty((batch, tokens), dtype=torch.float32, device=query.device)
    wrap_triton(_mean_over_heads)[triton.cdiv(tokens, BLOCK_TOKENS), batch](
        logits,
        maxima,
        sums,
        visual_index,
        lengths,
        scores,
        heads,
        length,
        splits,
        tokens,
        BLOCK_TOKENS=BLOCK_TOKENS,
        BLOCK_HEADS=min(BLOCK_HEADS, triton.next_power_of_2(heads)),
        BLOCK_SPLITS=BLOCK_SPLITS,
    )
    return scores
