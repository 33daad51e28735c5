"""``reroute::attention_with_softcap``: attention whose logits are bounded."""

import torch

from .reference import attention_with_softcap_reference, soft_cap, soft_capped_maps

__all__ = ["attention_with_softcap", "attention_with_softcap_reference", "soft_cap", "soft_capped_maps"]


@torch.library.custom_op("reroute::attention_with_softcap", mutates_args=())
def attention_with_softcap(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    softcap: float,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> torch.Tensor:
    """Scaled dot-product attention whose logits are drawn smoothly into a range.

    ``softmax(softcap * tanh(query @ key^T * scale / softcap))`` times the values (Gemma 2, arXiv 2408.00118, section
    2), soft cap and softmax in float32.

    Args:
        query: ``[B, H, Q, D]``, floating point.
        key: ``[B, Hkv, K, D]``, H a multiple of Hkv.
        value: ``[B, Hkv, K, D]``.
        softcap: bound of the logits, above 0.
        attn_mask: what each token sees, ``[B or 1, 1, Q, K]`` bool; None for everything.
        is_causal: whether each token sees those up to itself; then Q is K and there is no mask.
        scale: factor on the dot products.

    Returns:
        ``[B, H, Q, D]``, contiguous.
    """
    return attention_with_softcap_reference(query, key, value, softcap, attn_mask, is_causal, scale)


@attention_with_softcap.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    softcap: float,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> torch.Tensor:
    return query.new_empty(query.shape)
