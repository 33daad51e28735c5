"""What ``reroute::restore_tokens`` computes, in plain PyTorch."""

import torch


def restore_tokens_reference(
    stream: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """See `reroute_fx.kernels.restore_tokens`."""
    batch, length, _ = stream.shape
    active = positions.shape[1]
    # Which row each place of the stream takes; `active` for none. One place more takes what is not written.
    numbers = torch.arange(active, device=positions.device).expand(batch, active)
    source = torch.full((batch, length + 1), active, device=positions.device)
    source = source.scatter(1, positions.clamp(max=length), numbers)[:, :length, None]
    written = rows.gather(1, source.clamp(max=active - 1).expand_as(stream))
    return torch.where(source < active, written, stream).contiguous()
