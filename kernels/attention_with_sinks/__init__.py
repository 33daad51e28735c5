"""``reroute::attention_with_sinks``: attention of which a part goes to no token."""

import torch

from .reference import attention_with_sinks_reference, with_sink_token

__all__ = ["attention_with_sinks", "attention_with_sinks_reference", "with_sink_token"]


@torch.library.custom_op("reroute::attention_with_sinks", mutates_args=())
def attention_with_sinks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> torch.Tensor:
    """Scaled dot-product attention with one more logit for each head, which has no value.

    ``softmax([query @ key^T * scale, sink])``, of which the last column is dropped, times the values (GPT-OSS, arXiv
    2508.10925, section 2.2).

    Args:
        query: ``[B, H, Q, D]``, floating point.
        key: ``[B, Hkv, K, D]``, H a multiple of Hkv.
        value: ``[B, Hkv, K, D]``.
        sinks: logit of each head, ``[H]``.
        attn_mask: what each token sees, ``[B or 1, H or 1, Q, K]`` bool; None for everything.
        is_causal: whether each token sees those up to itself; then Q is K and there is no mask.
        scale: factor on the dot products.

    Returns:
        ``[B, H, Q, D]``, contiguous.
    """
    return attention_with_sinks_reference(query, key, value, sinks, attn_mask, is_causal, scale)


@attention_with_sinks.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> torch.Tensor:
    return query.new_empty(query.shape)
