"""``reroute::visual_scores``: how much the last prompt row attends to each visual token."""

import torch

from .reference import visual_scores_reference

__all__ = ["visual_scores", "visual_scores_reference"]


@torch.library.custom_op("reroute::visual_scores", mutates_args=())
def visual_scores(
    query: torch.Tensor, keys: torch.Tensor, visual_index: torch.Tensor, scale: float
) -> torch.Tensor:
    """Head mean of the softmax attention of one query row, at the visual positions.

    The softmax runs over all S keys, text included, in float32; then the visual entries are read.

    Args:
        query: rotated query of the last prompt row, ``[B, H, 1, D]``, floating point.
        keys: rotated keys of every row in the stream, ``[B, Hkv, S, D]``, H a multiple of Hkv.
        visual_index: positions of the visual tokens in 0..S-1, ``[B, N]`` int64.
        scale: factor on the dot products.

    Returns:
        ``[B, N]`` float32, contiguous.
    """
    return visual_scores_reference(query, keys, visual_index, scale)


@visual_scores.register_fake
def _(query: torch.Tensor, keys: torch.Tensor, visual_index: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.empty(visual_index.shape, dtype=torch.float32, device=query.device)
