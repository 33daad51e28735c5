"""Rank by values: which visual tokens say what the question says. No rotary position and no key takes part."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..passes import Candidates
from .rule_checks import FORBID, Layer, is_layer
from .similarity import among_visual, mean_over_text


@dataclass(frozen=True)
class ValueRule:
    """Similarity of values to those of the text behind the last picture.

    ``s_i = mean over heads and text t of softmax_i(v_t . v_i / sqrt(D))`` over the visual tokens i, after the text
    part of IVC-Prune's ranking (arXiv 2602.03060).

    Attributes:
        layer: ``"own"`` takes values of the decision layer, on its input, ``"previous"`` of the layer before.

    Raises:
        ConfigError: on construction, naming the field.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID

    layer: Layer = "own"
    by: Literal["values"] = "values"

    def __post_init__(self) -> None:
        is_layer(self.layer)

    def __str__(self) -> str:
        return f"value similarity to the text behind the pictures ({self.layer} layer)"

    def __call__(self, candidates: Candidates) -> torch.Tensor:
        values = candidates.values
        similar = among_visual(candidates, candidates.text_values, values, values.shape[-1] ** -0.5)
        return mean_over_text(candidates, similar)
