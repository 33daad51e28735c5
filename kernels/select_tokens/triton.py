"""``reroute::select_tokens`` as Triton kernels: one launch for up to 4096 visual tokens, two above.

A token's place in the ranking is the number of tokens that come before it, so nothing is sorted; an active
token's place in the stage is the number of active tokens before it.
"""

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

ONE_LAUNCH = 4096
"""Visual tokens of a row up to which one program ranks them all."""
BLOCK = 128
"""Visual tokens that are ranked at once."""
BLOCK_OTHERS = 32
"""Tokens that they are compared with at once: twice as many take all registers there are."""
BLOCK_PLACES = 1024
"""Places of the stream that are numbered at once."""


@triton.jit
def _in_order(score):
    """Integers in the order of float32 scores: both zeros equal, NaN above all, as `torch.sort` has it."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(score != score, 0x7FFFFFFF, ordered)


@triton.jit
def _is_kept(
    scores,
    keep,
    pools,
    first_token,
    tokens,
    SEVERAL_POOLS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
):
    """Whether the places of a block of tokens in the ranking are kept ones."""
    token = first_token + tl.arange(0, BLOCK)
    mine = _in_order(tl.load(scores + token, mask=token < tokens, other=0.0))
    place = tl.zeros([BLOCK], dtype=tl.int32)
    if SEVERAL_POOLS:
        my_pool = tl.load(pools + token, mask=token < tokens, other=0)
    for first in range(0, tokens, BLOCK_OTHERS):
        other = first + tl.arange(0, BLOCK_OTHERS)
        theirs = _in_order(tl.load(scores + other, mask=other < tokens, other=0.0))
        theirs = tl.where(other < tokens, theirs, -0x7FFFFFFF)  # below -inf
        # Of equal scores the earlier token comes first. Only where blocks overlap do single tokens decide.
        is_earlier = first + BLOCK_OTHERS <= first_token
        is_before = theirs[None, :] > (mine - is_earlier.to(tl.int32))[:, None]
        if (first < first_token + BLOCK) & (is_earlier == 0):
            is_before |= (theirs[None, :] == mine[:, None]) & (other[None, :] < token[:, None])
        if SEVERAL_POOLS:
            their_pool = tl.load(pools + other, mask=other < tokens, other=0x7FFFFFFFFFFFFFFF)
            is_before &= their_pool[None, :] == my_pool[:, None]
            is_before |= their_pool[None, :] < my_pool[:, None]
        place += tl.sum(is_before.to(tl.int32), axis=1)
    return tl.load(keep + place, mask=token < tokens, other=0) != 0


@triton.jit
def _place(
    scores,
    keep,
    pools,
    kept,
    visual_index,
    lengths,
    is_inactive,
    positions,
    tokens,
    length,
    slots,
    RANK: tl.constexpr,
    SEVERAL_POOLS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
):
    """Positions of the active tokens of one row. What one thread stores others read behind a barrier."""
    row = tl.program_id(0).to(tl.int64)
    in_row = tl.load(lengths + row)
    is_inactive += row * length
    for first in range(0, length, BLOCK_PLACES):
        place = first + tl.arange(0, BLOCK_PLACES)
        tl.store(is_inactive + place, (place >= in_row).to(tl.int8), mask=place < length)
    tl.debug_barrier()

    first_token = row * tokens
    for first in range(0, tokens, BLOCK):
        token = first + tl.arange(0, BLOCK)
        if RANK:
            is_kept = _is_kept(
                scores + first_token,
                keep + first_token,
                pools + first_token,
                first,
                tokens,
                SEVERAL_POOLS,
                BLOCK,
                BLOCK_OTHERS,
            )
            tl.store(kept + first_token + token, is_kept, mask=token < tokens)
        else:
            is_kept = tl.load(kept + first_token + token, mask=token < tokens, other=0) != 0
        index = tl.load(visual_index + first_token + token, mask=token < tokens, other=length)
        is_dropped = (is_kept == 0) & (index < in_row) & (token < tokens)
        tl.store(is_inactive + index, tl.full([BLOCK], 1, tl.int8), mask=is_dropped)
    tl.debug_barrier()

    active = tl.zeros([1], dtype=tl.int32)
    for first in range(0, length, BLOCK_PLACES):
        place = first + tl.arange(0, BLOCK_PLACES)
        is_active = tl.load(is_inactive + place, mask=place < length, other=1) == 0
        slot = active + tl.cumsum(is_active.to(tl.int32), axis=0) - 1
        tl.store(positions + row * slots + slot, place, mask=is_active & (slot < slots))
        active += tl.sum(is_active.to(tl.int32), axis=0)
    for first in range(0, slots, BLOCK_PLACES):
        slot = first + tl.arange(0, BLOCK_PLACES)
        no_token = tl.zeros([BLOCK_PLACES], dtype=tl.int64) + length
        tl.store(positions + row * slots + slot, no_token, mask=(slot >= active) & (slot < slots))


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
    first = tl.program_id(0) * BLOCK
    row = tl.program_id(1).to(tl.int64) * tokens
    is_kept = _is_kept(
        scores + row, keep + row, pools + row, first, tokens, SEVERAL_POOLS, BLOCK, BLOCK_OTHERS
    )
    token = first + tl.arange(0, BLOCK)
    tl.store(kept + row + token, is_kept, mask=token < tokens)


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
    several_pools, one_launch = pools is not None, tokens <= ONE_LAUNCH
    pools = visual_index if pools is None else pools
    ranked = [t.contiguous() for t in (scores.float(), keep, pools)]
    positions = visual_index.new_empty((batch, slots))
    kept = torch.empty((batch, tokens), dtype=torch.bool, device=scores.device)
    if not one_launch:
        wrap_triton(_rank)[triton.cdiv(tokens, BLOCK), batch](
            *ranked, kept, tokens, SEVERAL_POOLS=several_pools, BLOCK=BLOCK, BLOCK_OTHERS=BLOCK_OTHERS
        )
    is_inactive = torch.empty((batch, length), dtype=torch.int8, device=scores.device)
    wrap_triton(_place)[(batch,)](
        *ranked,
        kept,
        visual_index.contiguous(),
        lengths.contiguous(),
        is_inactive,
        positions,
        tokens,
        length,
        slots,
        RANK=one_launch,
        SEVERAL_POOLS=several_pools,
        BLOCK=BLOCK,
        BLOCK_OTHERS=BLOCK_OTHERS,
        BLOCK_PLACES=BLOCK_PLACES,
    )
    return positions, kept
