"""What ``reroute::visual_scores`` computes, in plain PyTorch."""

import torch

from ..attention_with_softcap import soft_cap


def visual_scores_reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    visual_index: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """See `reroute_fx.kernels.visual_scores`; `softcap` bounds the logits, which the operator doesn't."""
    batch, heads, _, head_dim = query.shape
    kv_heads, length = keys.shape[1:3]
    grouped = query.float().reshape(batch, kv_heads, heads // kv_heads, head_dim)
    logits = grouped @ keys.float().transpose(2, 3) * scale  # [B, Hkv, H/Hkv, S]
    logits = soft_cap(logits, softcap)
    is_padding = torch.arange(length, device=keys.device) >= lengths[:, None]
    logits = logits.masked_fill(is_padding[:, None, None], -torch.inf)
    attention = logits.softmax(dim=-1).mean(dim=(1, 2))  # [B, S]
    scores = attention.gather(1, visual_index.clamp(max=length - 1))
    return scores.masked_fill(visual_index >= lengths[:, None], -torch.inf)
