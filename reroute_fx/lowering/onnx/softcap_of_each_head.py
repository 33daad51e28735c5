"""``reroute::attention_with_softcap`` with keys repeated for each head, for programs of any size.

The reference lets heads that share keys be rows of one product. To split them again torch.export has to know how sizes
compare that are symbols, and would fix them.
"""

import torch

from ...kernels import soft_capped_maps


def attention_with_softcap_of_each_head(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    softcap: float,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> torch.Tensor:
    """What `reroute_fx.kernels.attention_with_softcap` computes."""
    key, value = (_repeated(states, query.shape[1]) for states in (key, value))
    logits = (query @ key.transpose(2, 3)).float() * scale
    return soft_capped_maps(logits, softcap, attn_mask, is_causal).to(value.dtype) @ value


def _repeated(states: torch.Tensor, heads: int) -> torch.Tensor:
    """``[B, H, K, D]`` of ``[B, Hkv, K, D]``: heads of a group lie one after the other."""
    batch, kv_heads, tokens, width = states.shape
    wide = states[:, :, None].expand(batch, kv_heads, heads // kv_heads, tokens, width)
    return wide.reshape(batch, heads, tokens, width)
