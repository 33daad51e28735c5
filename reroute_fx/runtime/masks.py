"""The masks that a model hands its decoder, next to the one that the decoder was captured with."""

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import UnsupportedModelError
from ..passes.tensor_names import LENGTHS
from .prompt import Prompt, TokensOnCache


def refuse_other_masks(mask: Any, call: Prompt | TokensOnCache, columns: int) -> None:
    """Raise UnsupportedModelError unless `mask` lets each token see those before it and itself, nothing else.

    Args:
        mask: None or ``[B, S]``, from which a decoder makes a causal mask itself; ``[B, heads or 1, S, S]``, bool or
            additive; or several of them by name.
        call: what the model is doing.
        columns: S.
    """
    if isinstance(mask, Mapping):
        for one in mask.values():
            refuse_other_masks(one, call, columns)
    elif mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        return
    elif not isinstance(mask, torch.Tensor) or mask.ndim != 4:
        raise _refusal(f"in a form of its own ({type(mask).__name__})")
    elif isinstance(call, Prompt):
        _compare(mask, _is_token(call, columns, mask.device))
    elif columns > 1:
        raise _refusal(f"of shape {list(mask.shape)} for {columns} tokens on a cache")


def _compare(mask: torch.Tensor, is_token: torch.Tensor | None) -> None:
    seen = mask if mask.dtype is torch.bool else mask > torch.finfo(mask.dtype).min / 2  # [B, H, S, S]
    columns = seen.shape[-1]
    expected = torch.ones(columns, columns, dtype=torch.bool, device=mask.device).tril()
    if seen.shape[-2] != columns:
        raise _refusal(f"of shape {list(mask.shape)}")
    differs = seen != expected
    if is_token is not None:
        # What padding sees, and that it is not seen, makes no difference.
        differs = (seen != expected & is_token[:, None, None]) & is_token[:, None, :, None]
    if differs.any():
        query, key = differs.nonzero()[0, -2:].tolist()
        what = "sees" if key > query else "does not see"
        raise _refusal(f"in which token {query} {what} token {key}")


def _is_token(prompt: Prompt, columns: int, device: torch.device) -> torch.Tensor | None:
    """Which columns hold a token, ``[B, S]`` bool; None if all do."""
    if prompt.reduction is not None:
        return prompt.reduction.is_token
    if prompt.places is None:
        return None
    lengths = prompt.plan.inputs[LENGTHS]
    in_front = torch.arange(columns, device=device) < lengths[:, None]
    return torch.zeros_like(in_front).scatter(1, prompt.places.order, in_front)


def _refusal(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The model gives its decoder an attention mask {what}; expected the plain causal one, which the decoder was "
        f"captured with. Models whose image tokens see each other can't be routed; use the model that was compiled."
    )
