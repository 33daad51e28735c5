"""``reroute::select_tokens`` in comparisons, sums and lookups, for what can't sort.

TensorRT sorts less than 3840 values, and not stably. Here the place of a token in the ranking is the number of tokens
before it: N * N comparisons, and memory for them.
"""

import torch


def select_tokens_by_counting(
    scores: torch.Tensor,
    visual_index: torch.Tensor,
    lengths: torch.Tensor,
    keep: torch.Tensor,
    pools: torch.Tensor | None,
    length: int,
    slots: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `reroute_fx.kernels.select_tokens` computes, ties included, of scores that are numbers."""
    rank = _ranking(scores, pools)
    kept = keep[row_numbers(scores.shape[0], rank), rank]
    dropped = torch.logical_and(kept.logical_not(), visual_index < lengths.unsqueeze(1))
    # A slot takes the position of its own number, and one more for each dropped token with no more active ones
    # before it than that number.
    active_before = visual_index - count_before(dropped)
    slot = torch.arange(slots, device=scores.device)
    is_passed = active_before.unsqueeze(1) <= slot.unsqueeze(1)  # [B, S', N]
    positions = slot + torch.logical_and(dropped.unsqueeze(1), is_passed).sum(2)
    return torch.where(positions < lengths.unsqueeze(1), positions, length), kept


def row_numbers(batch: int, positions: torch.Tensor) -> torch.Tensor:
    """Number of the row of each position, ``[B, 1]``."""
    return torch.arange(batch, device=positions.device).unsqueeze(1)


def count_before(flags: torch.Tensor) -> torch.Tensor:
    """How many of `flags` ``[B, N]`` are set before each place."""
    number = torch.arange(flags.shape[1], device=flags.device)
    is_before = number < number.unsqueeze(1)  # [N, N], a row for each place
    return torch.logical_and(flags.unsqueeze(1), is_before).sum(2)


def _ranking(scores: torch.Tensor, pools: torch.Tensor | None) -> torch.Tensor:
    """Place of each token ``[B, N]``: pool by pool, the highest score first, equal ones in order."""
    own, other = scores.unsqueeze(2), scores.unsqueeze(1)
    number = torch.arange(scores.shape[1], device=scores.device)
    is_earlier = number < number.unsqueeze(1)
    is_ahead = torch.logical_or(other > own, torch.logical_and(other == own, is_earlier))
    if pools is not None:
        own, other = pools.unsqueeze(2), pools.unsqueeze(1)
        is_ahead = torch.logical_or(other < own, torch.logical_and(other == own, is_ahead))
    return is_ahead.sum(2)
