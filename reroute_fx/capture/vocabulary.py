"""Export the two ends of a text decoder: token embeddings and head."""

from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel

from ..kernels import soft_cap
from .visual_tokens import find_visual_token_ids


def capture_embeddings(model: PreTrainedModel) -> ExportedProgram:
    """From ``input_ids [B, S]`` int64 to ``{"inputs_embeds": [B, S, d]}``."""
    ids = torch.zeros(2, 3, dtype=torch.int64, device=model.device)
    return _export(_Named(model.get_input_embeddings(), "inputs_embeds"), {"given": ids})


def capture_head(model: PreTrainedModel, takes_types: bool = False) -> ExportedProgram:
    """From hidden states ``[B, Q, d]`` to ``{"logits": [B, Q, vocabulary]}``, bounded if the model bounds them.

    Args:
        model: with a head.
        takes_types: whether its prompts need ``token_type_ids``.
    """
    text = model.config.get_text_config(decoder=True)
    head, bound = model.get_output_embeddings(), getattr(text, "final_logit_softcapping", None)
    if bound is not None and _is_bounded(model, bound, takes_types):
        head = nn.Sequential(head, _Bound(bound))
    hidden = torch.zeros(2, 3, text.hidden_size, device=model.device, dtype=model.dtype)
    return _export(_Named(head, "logits"), {"given": hidden})


@torch.no_grad()
def _is_bounded(model: PreTrainedModel, bound: float, takes_types: bool) -> bool:
    """Whether a model bounds its logits as its decoder's config says: of models around one decoder not all do."""
    visual = find_visual_token_ids(model.config)
    tokens = [token for token in range(3, 7 + len(visual)) if token not in visual]
    given: dict[str, Any] = {"input_ids": torch.tensor([tokens], device=model.device)}
    if takes_types:
        given["token_type_ids"] = torch.zeros_like(given["input_ids"])
    heard: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda *call: heard.append(call[-1]))
    try:
        logits = model(**given).logits
    finally:
        hook.remove()
    off, off_bounded = ((logits - each).abs().max() for each in (heard[-1], _Bound(bound)(heard[-1])))
    return bool(off_bounded < off)


class _Bound(nn.Module):
    """Logits drawn smoothly into -bound..bound (Gemma 2, arXiv 2408.00118, section 2)."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = bound

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return soft_cap(logits, self.bound)


class _Named(nn.Module):
    def __init__(self, inner: nn.Module, name: str) -> None:
        super().__init__()
        self.inner, self.name = inner, name

    def forward(self, given: torch.Tensor) -> dict[str, torch.Tensor]:
        return {self.name: self.inner(given)}


def _export(module: nn.Module, inputs: dict[str, torch.Tensor]) -> ExportedProgram:
    sizes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    with torch.no_grad():
        return torch.export.export(module, (), inputs, dynamic_shapes={"given": sizes}, strict=False)
