"""What ``reroute::attention_with_sinks`` computes, in plain PyTorch."""

import torch
import torch.nn.functional as F

_ALIGNED = 8
"""Fused attention wants widths in multiples of this."""


def attention_with_sinks_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> torch.Tensor:
    """See `reroute_fx.kernels.attention_with_sinks`.

    Plain attention, so that what is fused for it serves here: in front of all tokens comes one that each of them sees,
    with the sink for a logit and zeros for a value.
    """
    width = query.shape[3]
    query, key = with_sink_token(query, key, sinks, scale)
    value = F.pad(value, (0, query.shape[3] - width, 1, 0))
    if attn_mask is not None:
        attn_mask = torch.cat([torch.ones_like(attn_mask[..., :1]), attn_mask], dim=3)
    elif is_causal:
        query = F.pad(query, (0, 0, 1, 0))
    grouped = query.shape[1] != key.shape[1]
    result = F.scaled_dot_product_attention(
        query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=grouped
    )
    return result[:, :, 1 if is_causal else 0 :, :width].contiguous()


def with_sink_token(
    query: torch.Tensor, key: torch.Tensor, sinks: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys with one more key in front, whose logit is the sink of a query's head; all are wider.

    Args:
        query: ``[B, H, Q, D]``.
        key: ``[B, Hkv, K, D]``.
        sinks: ``[H]``.
        scale: factor on the dot products.

    Returns:
        ``[B, H, Q, D + 8]`` and ``[B, Hkv, 1 + K, D + 8]``.
    """
    width = query.shape[3]
    column = (sinks / scale).to(query.dtype)[:, None, None].expand(*query.shape[:3], 1)
    query = F.pad(torch.cat([query, column], dim=3), (0, _ALIGNED - 1))
    token = torch.arange(width + _ALIGNED, device=key.device) == width
    first = token.to(key.dtype).expand(*key.shape[:2], 1, width + _ALIGNED)
    return query, torch.cat([first, F.pad(key, (0, _ALIGNED))], dim=2)
