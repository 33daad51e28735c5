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


def restore_tokens_reference_(stream: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> None:
    """See `reroute_fx.kernels.restore_tokens_`."""
    is_written = positions < stream.shape[1]
    has_first = is_written[:, :1]
    # What is not written repeats the first row in its place: equal values may be written in any order.
    place = torch.where(is_written, positions, torch.where(has_first, positions[:, :1], 0))
    first = torch.where(has_first[..., None], rows[:, :1], stream[:, :1])
    values = torch.where(is_written[..., None], rows, first)
    stream.scatter_(1, place[..., None].expand_as(values), values)
