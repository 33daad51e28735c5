"""What ``reroute::select_tokens`` computes, in plain PyTorch."""

import torch


def select_tokens_reference(
    scores: torch.Tensor, visual_index: torch.Tensor, keep: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reroute_fx.kernels.select_tokens`."""
    batch, tokens = visual_index.shape
    ranking = scores.sort(dim=1, descending=True, stable=True).indices
    selected = ranking[:, :keep].sort(dim=1).values

    # Sorting positions with the deferred ones pushed past the end keeps every shape static.
    position = torch.arange(length, device=scores.device).expand(batch, length)
    deferred = torch.zeros_like(position, dtype=torch.bool)
    deferred = deferred.scatter(1, visual_index, True)
    deferred = deferred.scatter(1, visual_index.gather(1, selected), False)
    positions = position.masked_fill(deferred, length).sort(dim=1).values
    return positions[:, : length - tokens + keep].contiguous(), selected.contiguous()
