"""What a decoder takes for each token besides its embedding and its position."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import InputError


@dataclass(frozen=True)
class TokenInput:
    """An argument of a decoder that its programs take under the same name, ``[B, S, *sizes]``.

    Attributes:
        name: of the argument.
        sizes: for each token.
        dtype: None for that of the embeddings.
        is_optional: whether zeros say the same as nothing.
    """

    name: str
    sizes: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    is_optional: bool = False

    def none(self, embeds: torch.Tensor) -> torch.Tensor:
        """Zeros for tokens ``[B, S, d]``."""
        return embeds.new_zeros((*embeds.shape[:2], *self.sizes), dtype=self.dtype)

    def take(self, given: Mapping[str, Any], embeds: torch.Tensor) -> torch.Tensor:
        """What a call gives.

        Raises:
            InputError: it gives nothing, and zeros would say something else.
        """
        found: torch.Tensor | None = given.get(self.name)
        if found is not None:
            return found.to(dtype=self.dtype or embeds.dtype)
        if not self.is_optional:
            raise InputError(
                f"The decoder got no {self.name}; expected [batch, length, "
                f"{', '.join(map(str, self.sizes))}] beside inputs_embeds. Pass it, or input_ids, which tell."
            )
        return self.none(embeds)


def find_token_inputs(decoder: PreTrainedModel) -> tuple[TokenInput, ...]:
    """Those of a decoder, by its arguments and its config.

    ``per_layer_inputs [B, S, layers, width]`` are embeddings of a token's id for each layer (Gemma 4),
    ``moe_mm_token_type_ids [B, S]`` tell tokens of pictures from text, 0, for their experts (Ernie 4.5 VL).
    """
    arguments = inspect.signature(type(decoder).forward).parameters
    config: Any = decoder.config
    found = []
    width = getattr(config, "hidden_size_per_layer_input", None)
    if "per_layer_inputs" in arguments and width:
        found.append(TokenInput("per_layer_inputs", (config.num_hidden_layers, width)))
    if "moe_mm_token_type_ids" in arguments:
        found.append(TokenInput("moe_mm_token_type_ids", dtype=torch.int64, is_optional=True))
    return tuple(found)
