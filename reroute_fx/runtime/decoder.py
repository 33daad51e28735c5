"""The text decoder of a routed model."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..config import RoutingConfig
from ..errors import InputError, UnsupportedModelError
from ..lowering import Executable
from .prompt import DecodeStep, Prompt, Routing

current_call: ContextVar[Prompt | DecodeStep | None] = ContextVar("current_call", default=None)
"""What the model that contains the decoder is doing."""


_HARMLESS = {"cache_position", "return_dict", "output_attentions", "output_hidden_states", "logits_to_keep"}
"""Arguments of a decoder that change nothing about what the routed program computes."""


class RoutedDecoder(torch.nn.Module):
    """Mixin for a Hugging Face text decoder: prompts with visual tokens run the routed program.

    Attributes:
        executable: routed prefill.
        routing_config: what it routes.
        position_rank: 2 for positions ``[B, S]``, 3 for ``[3, B, S]``.
    """

    executable: Executable
    routing_config: RoutingConfig
    position_rank: int
    config: Any

    def routed_forward(self, unrouted: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = current_call.get()
        if isinstance(call, Prompt):
            return self._prefill(call, **kwargs)
        if isinstance(call, DecodeStep):
            # Without padding one new token sees all of a layer's cache. A mask would be built for the
            # length of layer 0 and fit no other layer.
            kwargs["attention_mask"] = None
        return unrouted(*args, **kwargs)

    def _prefill(
        self,
        prompt: Prompt,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        attention_mask: Any = None,
        **rest: Any,
    ) -> BaseModelOutputWithPast:
        self._refuse_what_the_program_lacks(attention_mask, rest)
        cache = self._cache(past_key_values, use_cache)
        result = self.executable(
            inputs_embeds=inputs_embeds.contiguous(),
            position_ids=self._positions(position_ids, inputs_embeds),
            visual_index=prompt.visual_index,
        )
        values = result["routing"]
        keys = [values[f"key.{i}"] for i in range(self.config.num_hidden_layers)]
        if cache is not None:
            for i, key in enumerate(keys):
                cache.update(key, values[f"value.{i}"], i)
            cache.routing_config = self.routing_config  # type: ignore[attr-defined]
        prompt.routing = Routing(
            self.routing_config,
            selected={i: values[f"selected.{i}"] for i in self.routing_config.decision_layers},
            scores={i: values[f"scores.{i}"] for i in self.routing_config.decision_layers},
            kv_lengths=[key.shape[2] for key in keys],
        )
        hidden = result["output"].last_hidden_state
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)

    def _refuse_what_the_program_lacks(self, attention_mask: Any, rest: dict[str, Any]) -> None:
        """The program attends causally and takes embeddings and positions, nothing else."""
        if attention_mask is not None and not (
            isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
        ):
            raise UnsupportedModelError(
                f"The model gives its decoder a mask of its own ({type(attention_mask).__name__}); expected the causal "
                f"mask alone. Models whose image tokens see each other can't be routed."
            )
        unknown = [name for name, value in rest.items() if name not in _HARMLESS and value is not None]
        if unknown:
            raise UnsupportedModelError(
                f"The model gives its decoder {unknown}; expected embeddings and positions only. Models that add image "
                f"features inside the decoder can't be routed."
            )

    def _cache(self, given: Any, use_cache: bool | None) -> DynamicCache | None:
        if given is None:
            wanted = self.config.use_cache if use_cache is None else use_cache
            return DynamicCache(config=self.config) if wanted else None
        if not isinstance(given, DynamicCache):
            raise InputError(
                f"past_key_values is a {type(given).__name__}; expected a DynamicCache or none: the layers of a routed "
                f"model cache different numbers of tokens. Leave cache_implementation unset."
            )
        return given

    def _positions(self, given: torch.Tensor | None, embeds: torch.Tensor) -> torch.Tensor:
        batch, length = embeds.shape[:2]
        if given is None:
            given = torch.arange(length, device=embeds.device).expand(batch, length)
        if self.position_rank == 3:
            # Hugging Face may put the text positions in front of the three visual ones.
            given = given[-3:] if given.ndim == 3 else given.expand(3, batch, length)
        else:
            given = given.expand(batch, length)
        return given.contiguous()
