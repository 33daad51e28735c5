"""What ``reroute::select_tokens`` computes, in plain PyTorch."""

import torch


def select_tokens_reference(
    scores: torch.Tensor,
    visual_index: torch.Tensor,
    lengths: torch.Tensor,
    keep: torch.Tensor,
    pools: torch.Tensor | None,
    length: int,
    slots: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reroute_fx.kernels.select_tokens`."""
    ranking = scores.sort(dim=1, descending=True, stable=True).indices
    if pools is not None:
        by_pool = pools.gather(1, ranking).sort(dim=1, stable=True).indices
        ranking = ranking.gather(1, by_pool)
    kept = torch.zeros_like(keep, memory_format=torch.contiguous_format).scatter(1, ranking, keep)

    # Sorting positions with the inactive ones pushed past the end keeps every shape static. One place more than
    # the stream has takes the entries that stand for no token.
    position = torch.arange(length + 1, device=scores.device)
    inactive = position >= lengths[:, None]  # [B, S + 1]
    inactive = inactive.scatter(1, visual_index.clamp(max=length), ~kept)
    positions = position.masked_fill(inactive, length).sort(dim=1).values
    return positions[:, :slots].contiguous(), kept
