"""``reroute::select_tokens``: which tokens run through a stage."""

import torch

from .reference import select_tokens_reference

__all__ = ["keep_count", "select_tokens", "select_tokens_reference"]


def keep_count(tokens: int, ratio: float) -> int:
    """Kept tokens of `tokens` at `ratio`: ``max(1, int(tokens * ratio))``, for an int or a symbolic int."""
    return torch.sym_max(1, torch.sym_int(tokens * ratio))  # type: ignore[no-any-return]


@torch.library.custom_op("reroute::select_tokens", mutates_args=())
def select_tokens(
    scores: torch.Tensor, visual_index: torch.Tensor, keep: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `keep` visual tokens with the highest scores, and the positions of all active tokens.

    Equal scores go to the lower position. Everything that is no visual token is active.

    Args:
        scores: ``[B, N]`` floating point.
        visual_index: ascending positions of the visual tokens in 0..length-1, ``[B, N]`` int64.
        keep: number of visual tokens to keep, 1..N.
        length: rows in the stream, S.

    Returns:
        ``positions [B, S - N + keep]`` and ``selected [B, keep]``, both int64, ascending and
        contiguous. `selected` counts in 0..N-1, the tokens' order in `visual_index`.
    """
    return select_tokens_reference(scores, visual_index, keep, length)


@select_tokens.register_fake
def _(
    scores: torch.Tensor, visual_index: torch.Tensor, keep: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, tokens = visual_index.shape
    positions = visual_index.new_empty((batch, length - tokens + keep))
    return positions, visual_index.new_empty((batch, keep))
