"""``reroute::visual_scores``: how much the last token of a row attends to each visual token."""

import torch

from .reference import visual_scores_reference

__all__ = ["visual_scores", "visual_scores_reference"]


@torch.library.custom_op("reroute::visual_scores", mutates_args=())
def visual_scores(
    query: torch.Tensor, keys: torch.Tensor, visual_index: torch.Tensor, lengths: torch.Tensor, scale: float
) -> torch.Tensor:
    """Head mean of the softmax attention of one query row, at the visual positions.

    The softmax runs over all tokens of the row, text included, in float32; then the visual entries are read.

    Args:
        query: rotated query of the last token of each row, ``[B, H, 1, D]``, floating point.
        keys: rotated keys of every place in the stream, ``[B, Hkv, S, D]``, H a multiple of Hkv.
        visual_index: positions of the visual tokens, ``[B, N]`` int64. An entry at or above the length of its
            row stands for no token.
        lengths: tokens of each row, ``[B]`` int64, 1..S. Later places are padding and get no attention.
        scale: factor on the dot products.

    Returns:
        ``[B, N]`` float32, contiguous; -inf where there is no token.
    """
    return visual_scores_reference(query, keys, visual_index, lengths, scale)


@visual_scores.register_fake
def _(
    query: torch.Tensor, keys: torch.Tensor, visual_index: torch.Tensor, lengths: torch.Tensor, scale: float
) -> torch.Tensor:
    return torch.empty(visual_index.shape, dtype=torch.float32, device=query.device)


@visual_scores.register_kernel("cuda")
def _(
    query: torch.Tensor, keys: torch.Tensor, visual_index: torch.Tensor, lengths: torch.Tensor, scale: float
) -> torch.Tensor:
    from .triton import visual_scores_triton

    with torch.cuda.device(query.device):
        result: torch.Tensor = visual_scores_triton(query, keys, visual_index, lengths, scale)
    return result
