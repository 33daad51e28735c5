"""``reroute::compact_tokens`` as a Triton kernel: all tensors in one launch."""

from math import prod

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

BLOCK = 4096
"""Elements of a row that one program copies: with 16 bytes for each thread, up to 8 accesses in flight."""
TENSORS = 4
"""Tensors of a launch: residual stream, cos, sin and one more. Beyond that there are several launches."""


@triton.jit
def _copy_block(
    source,
    result,
    width,
    source_rows,
    batch_rows,
    block,
    row,
    rows,
    active,
    length,
    position,
    BLOCK: tl.constexpr,
):
    """Copy one block of one row; zeros where the position is no token."""
    blocks = tl.cdiv(width, BLOCK)
    plane = (block // blocks).to(tl.int64)
    column = block % blocks * BLOCK + tl.arange(0, BLOCK)
    origin = (plane * source_rows + row // active * batch_rows + position) * width
    values = tl.load(source + origin + column, mask=(column < width) & (position < length), other=0)
    tl.store(result + (plane * rows + row) * width + column, values, mask=column < width)


@triton.jit
def _copy_rows(
    positions,
    batch,
    active,
    length,
    source_0,
    result_0,
    width_0,
    source_rows_0,
    batch_rows_0,
    end_0,
    source_1,
    result_1,
    width_1,
    source_rows_1,
    batch_rows_1,
    end_1,
    source_2,
    result_2,
    width_2,
    source_rows_2,
    batch_rows_2,
    end_2,
    source_3,
    result_3,
    width_3,
    source_rows_3,
    batch_rows_3,
    end_3,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy one block of the tensor that the block's number falls into.

    Each tensor has arguments of its own: kernels that a compiler traces take no lists.
    """
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    position = tl.load(positions + row)
    rows = batch * active
    if block < end_0:
        _copy_block(
            source_0,
            result_0,
            width_0,
            source_rows_0,
            batch_rows_0,
            block,
            row,
            rows,
            active,
            length,
            position,
            BLOCK,
        )
    if COUNT > 1:
        if (block >= end_0) & (block < end_1):
            _copy_block(
                source_1,
                result_1,
                width_1,
                source_rows_1,
                batch_rows_1,
                block - end_0,
                row,
                rows,
                active,
                length,
                position,
                BLOCK,
            )
    if COUNT > 2:
        if (block >= end_1) & (block < end_2):
            _copy_block(
                source_2,
                result_2,
                width_2,
                source_rows_2,
                batch_rows_2,
                block - end_1,
                row,
                rows,
                active,
                length,
                position,
                BLOCK,
            )
    if COUNT > 3:
        if (block >= end_2) & (block < end_3):
            _copy_block(
                source_3,
                result_3,
                width_3,
                source_rows_3,
                batch_rows_3,
                block - end_2,
                row,
                rows,
                active,
                length,
                position,
                BLOCK,
            )


class _Copy:
    """One tensor's share of a launch: `lead` planes of ``[B or 1, S, width]``."""

    def __init__(self, source: torch.Tensor, result: torch.Tensor, dim: int) -> None:
        self.source, self.result = source, result
        self.length, self.is_shared = source.shape[dim], source.shape[dim - 1] == 1
        self.lead, self.width = prod(source.shape[: dim - 1]), prod(source.shape[dim + 1 :])


def _launch(copies: list[_Copy], positions: torch.Tensor) -> None:
    batch, active = positions.shape
    block = min(BLOCK, max(triton.next_power_of_2(copy.width) for copy in copies))
    first, arguments = 0, []
    for copy in copies:
        end = first + copy.lead * triton.cdiv(copy.width, block)
        source_rows = copy.length * (1 if copy.is_shared else batch)
        batch_rows = 0 if copy.is_shared else copy.length
        arguments += [copy.source, copy.result, copy.width, source_rows, batch_rows, end]
        first = end
    # A tensor that stood here twice would be taken for two by functionalization.
    unused = [None, None, 0, 0, 0, 0] * (TENSORS - len(copies))
    wrap_triton(_copy_rows)[batch * active, first](
        positions, batch, active, copies[0].length, *arguments, *unused, COUNT=len(copies), BLOCK=block
    )


@triton_op("reroute::compact_tokens_triton", mutates_args={})
def compact_tokens_triton(
    tensors: list[torch.Tensor], positions: torch.Tensor, sequence_dims: list[int]
) -> list[torch.Tensor]:
    """See `reroute_fx.kernels.compact_tokens`."""
    batch, active = positions.shape
    positions = positions.contiguous()
    results = [
        x.new_empty((*x.shape[: dim - 1], batch, active, *x.shape[dim + 1 :]))
        for x, dim in zip(tensors, sequence_dims, strict=True)
    ]
    copies = [
        _Copy(x.contiguous(), result, dim)
        for x, result, dim in zip(tensors, results, sequence_dims, strict=True)
    ]
    for first in range(0, len(copies), TENSORS):
        _launch(copies[first : first + TENSORS], positions)
    return results
