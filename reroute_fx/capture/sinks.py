"""Attention with sinks, in the one operator that the passes know for it."""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .. import kernels  # noqa: F401 - it registers torch.ops.reroute

WITH_SINKS = "sdpa_with_sinks"
"""Name of the implementation."""


def has_sinks(decoder: nn.Module) -> bool:
    """Whether attention in a decoder has a logit of its own for each head, which stands for no token."""
    return any(isinstance(getattr(module, "sinks", None), nn.Parameter) for module in decoder.modules())


def attend_with_sinks(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    *,
    s_aux: torch.Tensor | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it; returns ``[B, Q, H, D]``. Without sinks, which a layer may lack, "sdpa"."""
    if s_aux is None:
        plain: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **more
        )
        return plain
    is_causal = attention_mask is None
    result = torch.ops.reroute.attention_with_sinks(
        query, key, value, s_aux, attention_mask, is_causal, scaling
    )
    return result.transpose(1, 2).contiguous(), None


AttentionInterface.register(WITH_SINKS, attend_with_sinks)
AttentionMaskInterface.register(WITH_SINKS, sdpa_mask)
