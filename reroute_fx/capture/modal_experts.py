"""Experts of which some are for text and others for pictures: without a choice that depends on the prompt.

A decoder of this kind sorts its tokens by their types and runs each kind apart, if there are pictures at all. A program
has to be the same for all prompts: both kinds of experts run on all tokens, and each token has what its own say.
"""

from types import MethodType
from typing import Any

import torch
from torch import nn


def run_all_experts(decoder: nn.Module) -> None:
    """Let the blocks of a decoder, which is a copy, that have both kinds of experts run both."""
    for module in decoder.modules():
        if isinstance(getattr(module, "text_moe", None), nn.Module) and hasattr(module, "vision_moe"):
            module.forward = MethodType(_run_all, module)


def _run_all(
    block: Any, hidden_states: torch.Tensor, moe_mm_token_type_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, None]:
    """``[B, S, d]`` of types ``[B, S]``, 0 for text; what experts score is left out."""
    result: torch.Tensor = block.text_moe(hidden_states)[0].reshape(hidden_states.shape)
    if moe_mm_token_type_ids is not None:
        of_pictures = block.vision_moe(hidden_states)[0].reshape(hidden_states.shape)
        result = torch.where(moe_mm_token_type_ids[..., None] > 0, of_pictures, result)
    if block.shared_experts is not None:
        result = result + block.shared_experts(hidden_states)
    return result, None
