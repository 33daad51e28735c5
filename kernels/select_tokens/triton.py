"""``reroute::select_tokens`` as two Triton kernels, each over many programs for a row.

A token's place in the ranking is the number of tokens that come before it, and the position in a slot is its number
plus that of the dropped tokens in front. Both are counted a block at a time: nothing is sorted, and no program waits
for another.
"""

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

BLOCK = 32
"""Visual tokens that one program ranks."""
BLOCK_OTHERS = 128
"""Tokens that they are compared with at once."""
BLOCK_SLOTS = 16
"""Slots of which one program finds the positions."""
BLOCK_TOKENS = 256
"""Visual tokens that are counted for them at once."""


@triton.jit
def _in_order(score):
    """Integers in the order of float32 scores: both zeros equal, NaN above all, as `torch.sort` has it."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(score != score, 0x7FFFFFFF, ordered)


@triton.jit
def _rank(
    scores,
    keep,
    pools,
    kept,
    tokens,
    SEVERAL_POOLS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
):
    """Which tokens of one block of a row are kept."""
    first_token = tl.program_id(0) * BLOCK
    row = tl.program_id(1).to(tl.int64) * tokens
    token = first_token + tl.arange(0, BLOCK)
    mine = _in_order(tl.load(scores + row + token, mask=token < tokens, other=0.0))
    if SEVERAL_POOLS:
        my_pool = tl.load(pools + row + token, mask=token < tokens, other=0)
    # Summed after the loop: a sum over a block takes the threads longer than its comparisons.
    before = tl.zeros([BLOCK, BLOCK_OTHERS], dtype=tl.int32)
    for first in range(0, tokens, BLOCK_OTHERS):
        other = first + tl.arange(0, BLOCK_OTHERS)
        theirs = _in_order(tl.load(scores + row + other, mask=other < tokens, other=0.0))
        theirs = tl.where(other < tokens, theirs, -0x7FFFFFFF)  # below -inf
        # Of equal scores the earlier token comes first. Only where blocks overlap do single tokens decide.
        is_earlier = first + BLOCK_OTHERS <= first_token
        is_before = theirs[None, :] > (mine - is_earlier.to(tl.int32))[:, None]
        if (first < first_token + BLOCK) & (is_earlier == 0):
            is_before |= (theirs[None, :] == mine[:, None]) & (other[None, :] < token[:, None])
        if SEVERAL_POOLS:
            their_pool = tl.load(pools + row + other, mask=other < tokens, other=0x7FFFFFFFFFFFFFFF)
            is_before &= their_pool[None, :] == my_pool[:, None]
            is_before |= their_pool[None, :] < my_pool[:, None]
        before += is_before.to(tl.int32)
    place = tl.sum(before, axis=1)
    is_kept = tl.load(keep + row + place, mask=token < tokens, other=0) != 0
    tl.store(kept + row + token, is_kept, mask=token < tokens)


@triton.jit
def _place(
    kept,
    visual_index,
    lengths,
    positions,
    tokens,
    length,
    slots,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Positions in one block of the slots of a row."""
    slot = tl.program_id(0) * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    row = tl.program_id(1).to(tl.int64)
    in_row = tl.load(lengths + row)
    dropped = tl.zeros([1], dtype=tl.int32)
    in_front = tl.zeros([BLOCK_SLOTS, BLOCK_TOKENS], dtype=tl.int32)
    for first in range(0, tokens, BLOCK_TOKENS):
        token = first + tl.arange(0, BLOCK_TOKENS)
        index = tl.load(visual_index + row * tokens + token, mask=token < tokens, other=length)
        is_kept = tl.load(kept + row * tokens + token, mask=token < tokens, other=1) != 0
        is_dropped = ((is_kept == 0) & (index < in_row)).to(tl.int32)
        # Without the dropped tokens before it, a dropped token would stand in this slot: it is in front of those
        # that come from there on.
        first_behind = index.to(tl.int32) - dropped - tl.cumsum(is_dropped, axis=0) + 1
        first_behind = tl.where(is_dropped != 0, first_behind, length)
        in_front += (first_behind[None, :] <= slot[:, None]).to(tl.int32)
        dropped += tl.sum(is_dropped, axis=0)
    position = slot + tl.sum(in_front, axis=1)
    position = tl.where(position < in_row, position, length)
    tl.store(positions + row * slots + slot, position, mask=slot < slots)


@triton_op("reroute::select_tokens_triton", mutates_args={})
def select_tokens_triton(
    scores: torch.Tensor,
    visual_index: torch.Tensor,
    lengths: torch.Tensor,
    keep: torch.Tensor,
    pools: torch.Tensor | None,
    length: int,
    slots: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reroute_fx.kernels.select_tokens`. Scores of float32 or less."""
    batch, tokens = visual_index.shape
    visual_index = visual_index.contiguous()
    kept = torch.empty((batch, tokens), dtype=torch.bool, device=scores.device)
    wrap_triton(_rank)[triton.cdiv(tokens, BLOCK), batch](
        scores.float().contiguous(),
        keep.contiguous(),
        visual_index if pools is None else pools.contiguous(),
        kept,
        tokens,
        SEVERAL_POOLS=pools is not None,
        BLOCK=BLOCK,
        BLOCK_OTHERS=BLOCK_OTHERS,
    )
    positions = visual_index.new_empty((batch, slots))
    wrap_triton(_place)[triton.cdiv(slots, BLOCK_SLOTS), batch](
        kept,
        visual_index,
        lengths.contiguous(),
        positions,
        tokens,
        length,
        slots,
        BLOCK_SLOTS=BLOCK_SLOTS,
        BLOCK_TOKENS=BLOCK_TOKENS,
    )
    return positions, kept
