"""``reroute::restore_tokens`` as a Triton kernel: writes the rows of a stage and nothing else."""

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

BLOCK = 4096
"""Elements of a row that one program writes: with 16 bytes for each thread, up to 8 accesses in flight."""


@triton.jit
def _write_rows(stream, rows, positions, length, active, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(positions + row)
    values = tl.load(rows + row * width + column, mask=column < width)
    target = (row // active * length + position) * width
    tl.store(stream + target + column, values, mask=(column < width) & (position < length))


def _launch(stream: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> None:
    batch, active, width = rows.shape
    block = min(BLOCK, triton.next_power_of_2(width))
    grid = (batch * active, triton.cdiv(width, block))
    wrap_triton(_write_rows)[grid](
        stream, rows.contiguous(), positions.contiguous(), stream.shape[1], active, width, BLOCK=block
    )


@triton_op("reroute::restore_tokens_triton", mutates_args={})
def restore_tokens_triton(stream: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """See `reroute_fx.kernels.restore_tokens`."""
    restored = stream.clone(memory_format=torch.contiguous_format)
    _launch(restored, rows, positions)
    return restored


@triton_op("reroute::restore_tokens_triton_", mutates_args={"stream"})
def restore_tokens_triton_(stream: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> None:
    """See `reroute_fx.kernels.restore_tokens_`."""
    _launch(stream, rows, positions)
