"""What ``reroute::visual_scores`` computes, in plain PyTorch."""

import torch


def visual_scores_reference(
    query: torch.Tensor, keys: torch.Tensor, visual_index: torch.Tensor, scale: float
) -> torch.Tensor:
    """See `reroute_fx.kernels.visual_scores`."""
    batch, heads, _, head_dim = query.shape
    kv_heads = keys.shape[1]
    grouped = query.float().reshape(batch, kv_heads, heads // kv_heads, head_dim)
    logits = grouped @ keys.float().transpose(2, 3) * scale  # [B, Hkv, H/Hkv, S]
    attention = logits.softmax(dim=-1).mean(dim=(1, 2))  # [B, S]
    return attention.gather(1, visual_index)
