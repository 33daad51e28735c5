"""Attention in segments of different lengths, with shapes that follow from those of the inputs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

SEGMENTS = "flash_segments"
"""Name of the implementation; models hand one with "flash" in its name all segments at once."""


def segments(bounds: torch.Tensor) -> torch.Tensor:
    """Places of the patches of each segment, ``[segments, longest]`` int64, -1 behind the last."""
    first, lengths = bounds[:-1].long(), bounds.diff().long()
    place = torch.arange(int(lengths.max()))
    return torch.where(place < lengths[:, None], first[:, None] + place, -1)


def attend_in_segments(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    *,
    cu_seq_lens_q: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of patches ``[1, H, P, D]`` to those of their own segment, which `cu_seq_lens_q` lists.

    Segments may have different lengths: all are as long as the longest, and padding is seen by none.

    Returns:
        ``[1, P, H, D]``.
    """
    patches, shape = query.shape[2], cu_seq_lens_q.shape
    is_patch = cu_seq_lens_q >= 0  # [W, L]
    places = cu_seq_lens_q.clamp(min=0).flatten()
    query, key, value = (
        states[0].index_select(1, places).unflatten(1, shape).transpose(0, 1)
        for states in (query, key, value)
    )  # [W, H, L, D]
    mask = is_patch[:, None, None, :].expand(-1, 1, shape[1], -1)
    seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    seen = seen.transpose(1, 2).flatten(0, 1)  # [W * L, H, D]
    target = torch.where(is_patch, cu_seq_lens_q, patches).flatten()
    result = seen.new_zeros(patches + 1, *seen.shape[1:]).index_copy(0, target, seen)
    return result[None, :patches], None


AttentionInterface.register(SEGMENTS, attend_in_segments)
