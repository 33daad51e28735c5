"""Attention that is more than scaled dot products, each form in the one operator that the passes know for it."""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .. import kernels  # noqa: F401 - it registers torch.ops.reroute
from ..errors import UnsupportedModelError

_ALL_FORMS = "sdpa_or_reroute"
"""Name of the implementation."""


def implementation_for(decoder: nn.Module) -> str:
    """Name of the attention to trace a decoder with."""
    return _ALL_FORMS if has_sinks(decoder) or _has_softcap(decoder) else "sdpa"


def has_sinks(decoder: nn.Module) -> bool:
    """Whether attention in a decoder has a logit of its own for each head, which stands for no token."""
    return any(isinstance(getattr(module, "sinks", None), nn.Parameter) for module in decoder.modules())


def _has_softcap(decoder: nn.Module) -> bool:
    """Whether attention in a decoder bounds its logits."""
    return any(getattr(module, "attn_logit_softcapping", None) is not None for module in decoder.modules())


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    *,
    s_aux: torch.Tensor | None = None,
    softcap: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it, in a form that a layer may lack; returns ``[B, Q, H, D]``.

    Raises:
        UnsupportedModelError: sinks and a soft cap in one layer.
    """
    if s_aux is None and softcap is None:
        plain: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **more
        )
        return plain
    if s_aux is not None and softcap is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} has attention sinks and soft-capped logits; expected one of them. Use the model "
            f"as it is."
        )
    operator = (
        torch.ops.reroute.attention_with_softcap if s_aux is None else torch.ops.reroute.attention_with_sinks
    )
    form = softcap if s_aux is None else s_aux
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    result = operator(query, key, value, form, attention_mask, attention_mask is None, scale)
    return result.transpose(1, 2).contiguous(), None


AttentionInterface.register(_ALL_FORMS, attend)
AttentionMaskInterface.register(_ALL_FORMS, sdpa_mask)
