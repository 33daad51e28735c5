"""``reroute::restore_tokens``: write the rows of a stage back into the residual stream."""

import torch

from .reference import restore_tokens_reference

__all__ = ["restore_tokens", "restore_tokens_reference"]


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
