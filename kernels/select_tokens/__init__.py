"""``reroute::select_tokens``: which tokens run through a stage."""

import torch

from .reference import select_tokens_reference

__all__ = ["keep_count", "select_tokens", "select_tokens_reference"]


def keep_count(tokens: int, ratio: float) -> int:
    """Kept tokens of a pool of `tokens` at `ratio`: ``max(1, int(tokens * ratio))``; none of none."""
    return max(1, int(tokens * ratio)) if tokens else 0


@torch.library.custom_op("reroute::select_tokens", mutates_args=())
def select_tokens(
    scores: torch.Tensor,
    visual_index: torch.Tensor,
    lengths: torch.Tensor,
    keep: torch.Tensor,
    pools: torch.Tensor | None,
    length: int,
    slots: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The visual tokens with the highest scores of each pool, and the positions of all active tokens.

    A row's visual tokens are ranked from the highest score down, equal scores by position, within their pool
    when there are several. `keep` says which places of the ranking are kept. Everything that is no visual
    token is active.

    Args:
        scores: ``[B, N]`` floating point; -inf where there is no token.
        visual_index: positions of the visual tokens, ascending where there is one, ``[B, N]`` int64. An entry
            at or above the length of its row stands for no token.
        lengths: tokens of each row, ``[B]`` int64, 1..length.
        keep: ``[B, N]`` bool. Places of the first pool come first, then those of the second, and so on; never
            more places than the pool has tokens.
        pools: number of each token's pool, ascending, ``[B, N]`` int64; None for one pool.
        length: places in the stream, S.
        slots: places of the stage, S': at least the active tokens of each row, at most S.

    Returns:
        ``positions [B, S']`` int64, ascending, S where a row has no more tokens, and ``kept [B, N]`` bool,
        both contiguous.
    """
    return select_tokens_reference(scores, visual_index, lengths, keep, pools, length, slots)


@select_tokens.register_fake
def _(
    scores: torch.Tensor,
    visual_index: torch.Tensor,
    lengths: torch.Tensor,
    keep: torch.Tensor,
    pools: torch.Tensor | None,
    length: int,
    slots: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch = visual_index.shape[0]
    return visual_index.new_empty((batch, slots)), torch.empty_like(
        keep, memory_format=torch.contiguous_format
    )


@select_tokens.register_kernel("cuda")
def _(
    scores: torch.Tensor,
    visual_index: torch.Tensor,
    lengths: torch.Tensor,
    keep: torch.Tensor,
    pools: torch.Tensor | None,
    length: int,
    slots: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    from .triton import select_tokens_triton

    with torch.cuda.device(scores.device):
        result: tuple[torch.Tensor, torch.Tensor] = select_tokens_triton(
            scores, visual_index, lengths, keep, pools, length, slots
        )
    return result
