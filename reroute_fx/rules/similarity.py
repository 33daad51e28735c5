"""What rules that compare text with visual tokens have in common."""

import torch

from ..kernels import soft_cap
from ..passes import Candidates


def among_visual(
    candidates: Candidates,
    queries: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Softmax over the visual tokens of each row of ``queries . keys * scale``, mean over heads, ``[B, T, N]`` float32.

    Args:
        candidates: of the decision.
        queries: ``[B, H, T, D]``.
        keys: of the whole stream, ``[B, Hkv, S, D]``.
        scale: factor on the products.
        softcap: bound of the logits; None for none.
    """
    batch, heads, tokens, width = queries.shape
    kv_heads, length = keys.shape[1:3]
    index = candidates.visual_index
    place = index.clamp(max=length - 1)[:, None, :, None].expand(batch, kv_heads, -1, width)
    visual = keys.gather(2, place).float()
    grouped = queries.float().reshape(batch, kv_heads, heads // kv_heads * tokens, width)
    logits = soft_cap(grouped @ visual.transpose(2, 3) * scale, softcap).view(batch, heads, tokens, -1)
    is_none = (index >= candidates.lengths[:, None])[:, None, None]
    # The lowest number, not -inf: a row without visual tokens stays free of NaN.
    return logits.masked_fill(is_none, torch.finfo(torch.float32).min).softmax(dim=-1).mean(dim=1)


def mean_over_text(candidates: Candidates, scores: torch.Tensor) -> torch.Tensor:
    """Mean of ``[B, T, N]`` over the text tokens that each row has, ``[B, N]``."""
    is_text = candidates.text_index < candidates.lengths[:, None]  # [B, T]
    total = scores.masked_fill(~is_text[:, :, None], 0).sum(dim=1)
    return total / is_text.sum(dim=1, keepdim=True)
