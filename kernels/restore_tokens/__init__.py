"""``reroute::restore_tokens``: write the rows of a stage back into the residual stream."""

import torch

from .reference import restore_tokens_reference, restore_tokens_reference_

__all__ = ["restore_tokens", "restore_tokens_", "restore_tokens_reference", "restore_tokens_reference_"]


@torch.library.custom_op("reroute::restore_tokens", mutates_args=())
def restore_tokens(stream: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The residual stream with `rows` at `positions`; all other rows as they were.

    Args:
        stream: ``[B, S, d]``.
        rows: ``[B, S', d]``, same dtype, S' at least 1.
        positions: ``[B, S']`` int64, at least 0, distinct in each row below S. Rows whose position is S or
            above are not written.

    Returns:
        ``[B, S, d]``, contiguous.
    """
    return restore_tokens_reference(stream, rows, positions)


@restore_tokens.register_fake
def _(stream: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return stream.new_empty(stream.shape)


@restore_tokens.register_kernel("cuda")
def _(stream: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    from .triton import restore_tokens_triton

    with torch.cuda.device(stream.device):
        result: torch.Tensor = restore_tokens_triton(stream, rows, positions)
    return result


@torch.library.custom_op("reroute::restore_tokens_", mutates_args={"stream"})
def restore_tokens_(stream: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> None:
    """Write `rows` into the residual stream itself, S' rows instead of S.

    Args:
        stream: ``[B, S, d]``, contiguous; written.
        rows: as for `restore_tokens`.
        positions: as for `restore_tokens`, and ascending.
    """
    restore_tokens_reference_(stream, rows, positions)


@restore_tokens_.register_fake
def _(stream: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> None:
    return None


@restore_tokens_.register_kernel("cuda")
def _(stream: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> None:
    from .triton import restore_tokens_triton_

    with torch.cuda.device(stream.device):
        restore_tokens_triton_(stream, rows, positions)
