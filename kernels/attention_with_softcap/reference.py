"""What ``reroute::attention_with_softcap`` computes, in plain PyTorch."""

import torch


def attention_with_softcap_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    softcap: float,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> torch.Tensor:
    """See `reroute_fx.kernels.attention_with_softcap`."""
    batch, heads, queries, width = query.shape
    kv_heads, tokens = key.shape[1:3]
    # Heads that share a key lie one after the other: ``[B, Hkv, H / Hkv * Q, D]``.
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * queries, width)
    logits = (grouped @ key.transpose(2, 3)).float() * scale
    maps = soft_capped_maps(logits.view(batch, heads, queries, tokens), softcap, attn_mask, is_causal)
    maps = maps.to(value.dtype).view(batch, kv_heads, -1, tokens)
    return (maps @ value).view(batch, heads, queries, width)


def soft_capped_maps(
    logits: torch.Tensor, softcap: float, attn_mask: torch.Tensor | None, is_causal: bool
) -> torch.Tensor:
    """How much each token looks at each other one, ``[B, H, Q, K]``, by scaled dot products of that shape."""
    logits = soft_cap(logits, softcap)
    if is_causal:
        place = torch.arange(logits.shape[-1], device=logits.device)
        attn_mask = place <= place[:, None]
    if attn_mask is not None:
        # The lowest number, not -inf: a row that sees nothing stays free of NaN.
        logits = logits.masked_fill(~attn_mask, torch.finfo(logits.dtype).min)
    return logits.softmax(dim=-1)


def soft_cap(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Logits drawn into -softcap..softcap; None leaves them as they are."""
    return logits if softcap is None else softcap * (logits / softcap).tanh()
