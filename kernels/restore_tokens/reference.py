"""What ``reroute::restore_tokens`` computes, in plain PyTorch."""

import torch


def restore_tokens_reference(
    stream: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """See `reroute_fx.kernels.restore_tokens`."""
    return stream.contiguous().scatter(1, positions.unsqueeze(-1).expand_as(rows), rows)
