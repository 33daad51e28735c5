"""What ``reroute::compact_tokens`` computes, in plain PyTorch."""

import torch


def compact_tokens_reference(
    tensors: list[torch.Tensor], positions: torch.Tensor, sequence_dims: list[int]
) -> list[torch.Tensor]:
    """See `reroute_fx.kernels.compact_tokens`."""
    return [_rows(x, positions, dim) for x, dim in zip(tensors, sequence_dims, strict=True)]


def _rows(x: torch.Tensor, positions: torch.Tensor, dim: int) -> torch.Tensor:
    batch, active = positions.shape
    lead, length, tail = x.shape[: dim - 1], x.shape[dim], x.shape[dim + 1 :]
    index = positions.view(*(1 for _ in lead), batch, active, *(1 for _ in tail))
    source = x.expand(*lead, batch, *x.shape[dim:])
    rows = source.gather(dim, index.clamp(max=length - 1).expand(*lead, batch, active, *tail))
    return rows.masked_fill(index >= length, 0)
