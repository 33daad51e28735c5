"""Export the two ends of a text decoder: token embeddings and head."""

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel


def capture_embeddings(model: PreTrainedModel) -> ExportedProgram:
    """From ``input_ids [B, S]`` int64 to ``{"inputs_embeds": [B, S, d]}``."""
    ids = torch.zeros(2, 3, dtype=torch.int64, device=model.device)
    return _export(_Named(model.get_input_embeddings(), "inputs_embeds"), {"given": ids})


def capture_head(model: PreTrainedModel) -> ExportedProgram:
    """From hidden states ``[B, Q, d]`` to ``{"logits": [B, Q, vocabulary]}``."""
    head = model.get_output_embeddings()
    width = model.config.get_text_config(decoder=True).hidden_size
    hidden = torch.zeros(2, 3, width, device=model.device, dtype=model.dtype)
    return _export(_Named(head, "logits"), {"given": hidden})


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
