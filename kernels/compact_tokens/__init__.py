"""``reroute::compact_tokens``: gather the active rows of sequence tensors."""

import torch

from .reference import compact_tokens_reference

__all__ = ["compact_tokens", "compact_tokens_reference"]


@torch.library.custom_op("reroute::compact_tokens", mutates_args=())
def compact_tokens(
    tensors: list[torch.Tensor], positions: torch.Tensor, sequence_dims: list[int]
) -> list[torch.Tensor]:
    """Rows of each tensor at `positions`.

    Args:
        tensors: tensors whose dimension ``sequence_dims[i]`` runs over the S rows of the stream and
            whose dimension before it is the batch, of size B or 1: ``[B, S, d]`` with 1,
            ``[3, B, S, d]`` with 2. Any dtype.
        positions: ``[B, S']`` int64, at least 0. S and above stand for no row.
        sequence_dims: one dimension for each tensor, at least 1.

    Returns:
        The tensors with B batches and S' rows, contiguous; zeros where there is no row.
    """
    return compact_tokens_reference(tensors, positions, sequence_dims)


@compact_tokens.register_fake
def _(tensors: list[torch.Tensor], positions: torch.Tensor, sequence_dims: list[int]) -> list[torch.Tensor]:
    batch, active = positions.shape
    return [
        x.new_empty((*x.shape[: dim - 1], batch, active, *x.shape[dim + 1 :]))
        for x, dim in zip(tensors, sequence_dims, strict=True)
    ]


@compact_tokens.register_kernel("cuda")
def _(tensors: list[torch.Tensor], positions: torch.Tensor, sequence_dims: list[int]) -> list[torch.Tensor]:
    from .triton import compact_tokens_triton

    with torch.cuda.device(positions.device):
        result: list[torch.Tensor] = compact_tokens_triton(tensors, positions, sequence_dims)
    return result
