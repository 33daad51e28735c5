"""Routing as one would write it in plain PyTorch: replaced layer forwards that gather, run the layer, and scatter.

Every routed layer is gathered for and scattered from on its own, and each decision materialises its scores layer by
layer in eager mode: what the published eager implementations do, on the same selections as this project's.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from reroute_fx import RoutingConfig
from reroute_fx.kernels import keep_count


class HookRouting:
    """Routes the decoder layers of a Hugging Face model in place, for prompts of equal length without padding.

    Args:
        decoder: Llama-like; its layers' forwards are replaced.
        config: with action ``compact_route``.
        visual_positions: places of the visual tokens in every row, ``[N]``.
    """

    def __init__(
        self, decoder: PreTrainedModel, config: RoutingConfig, visual_positions: torch.Tensor
    ) -> None:
        self.ratios = dict(zip(config.decision_layers, config.keep_ratios, strict=True))
        self.visual_positions = visual_positions
        self.active: torch.Tensor | None = None
        for index, layer in enumerate(decoder.layers):
            layer.forward = self._routed(index, layer, layer.forward)

    def _routed(self, index: int, layer: Any, forward: Any) -> Any:
        def run(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if hidden.shape[1] == 1:  # a generated token
                return forward(hidden, *args, **kwargs)
            cos, sin = kwargs["position_embeddings"]
            if index == 0:
                self.active = None
            if index in self.ratios:
                self.active = self._select(layer, hidden, cos, sin, self.ratios[index])
            kwargs["attention_mask"] = None
            if self.active is None:
                return forward(hidden, *args, **kwargs)
            rows = self.active[..., None].expand(-1, -1, hidden.shape[2])
            kwargs["position_embeddings"] = tuple(_rows(angle, self.active) for angle in (cos, sin))
            computed = forward(hidden.gather(1, rows), *args, **kwargs)
            return hidden.scatter(1, rows, computed)

        return run

    def _select(
        self, layer: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, ratio: float
    ) -> torch.Tensor:
        """Positions of the active tokens, ``[B, S']``, ascending."""
        batch, length, _ = hidden.shape
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        sections = (attention.config.rope_parameters or {}).get("mrope_section")
        cos, sin = (_merged(angle, sections) for angle in (cos, sin))
        keys = _rotated(_heads(attention.k_proj(normed), attention.head_dim), cos, sin)
        query = _rotated(
            _heads(attention.q_proj(normed[:, -1:]), attention.head_dim), cos[:, -1:], sin[:, -1:]
        )
        keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
        weights = (query.float() @ keys.float().transpose(2, 3) * attention.scaling).softmax(dim=-1)
        scores = weights.mean(dim=(1, 2))[:, self.visual_positions]
        count = keep_count(len(self.visual_positions), ratio)
        kept = self.visual_positions[scores.sort(dim=1, descending=True, stable=True).indices[:, :count]]
        text = torch.ones(length, dtype=torch.bool, device=hidden.device)
        text[self.visual_positions] = False
        text_positions = text.nonzero().flatten().expand(batch, -1)
        return torch.cat([text_positions, kept], dim=1).sort(dim=1).values


def _rows(angle: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rows of ``[..., B or 1, S, D]`` at positions ``[B, S']``."""
    index = positions[..., None].expand(*angle.shape[:-3], -1, -1, angle.shape[-1])
    return angle.expand(*angle.shape[:-3], len(positions), -1, -1).gather(-2, index)


def _merged(angle: torch.Tensor, sections: list[int] | None) -> torch.Tensor:
    """Angles of three rotary dimensions ``[3, B, S, D]`` as one; newer transformers do it before the layers."""
    if angle.ndim == 3 or sections is None:
        return angle
    parts = angle.split([*sections, *sections], dim=-1)
    return torch.cat([part[i % 3] for i, part in enumerate(parts)], dim=-1)


def _heads(projected: torch.Tensor, width: int) -> torch.Tensor:
    return projected.unflatten(-1, (-1, width)).transpose(1, 2)


def _rotated(tensor: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = tensor.chunk(2, dim=-1)
    return tensor * cos.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(1)
