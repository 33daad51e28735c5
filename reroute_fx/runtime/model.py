"""The routed model that users hold."""

import inspect
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..capture import text_decoder
from ..capture.copies import copy_sharing_weights
from ..capture.fingerprint import Fingerprint
from ..capture.vision_tower import CapturedTower
from ..config import RoutingConfig
from ..errors import InputError, RerouteError
from ..limits import Limits
from ..lowering import Executable, TensorRTProgram
from ..report import RoutingReport
from ..turns import one_at_a_time
from .cache import RoutedCache
from .decoder import UNROUTED, RoutedDecoder, current_call
from .prompt import Prompt, PromptReader
from .specialize import specialize


class RoutedModel(torch.nn.Module):
    """A Hugging Face vision-language model with a routed decoder.

    It is an instance of the class it was made from, takes the same inputs and returns the same output
    class; `generate` is Hugging Face's. Rows of a batch may have different lengths, padded on either side,
    and different images, or none. After a batch with visual tokens the output also has ``.routing``, a
    `Routing`. Batches without any visual token run unrouted. Parameters are shared with the original model,
    which stays as it was; hooks, configs and flags are the routed model's own. It is bound to the parts that it was
    compiled from: when a parameter or a module is replaced, here or in the original, the next call raises. For
    inference only: outputs carry no gradients.

    Threads may share a routed model, each with caches of its own. All that is compiled or routed in a process takes
    turns: a forward, each step of `generate` and `reroute_fx.compile` wait for the one that is running. `generate` as a
    whole doesn't, so that answers grow side by side.

    The key-value cache is a `RoutedCache`. Tokens that follow continue at the rotary position after the
    row's last one, whatever `position_ids` says.

    Attributes:
        routing_config: what is routed.
        programs: the routed programs, ``"prefill"`` and ``"continuation"``, and ``"images"`` if the method reduces
            pictures.
        tower: the vision tower with the reduction; None without one.
        original: class that it was made from.
    """

    original: type
    routing_config: RoutingConfig
    programs: dict[str, Executable | TensorRTProgram]
    tower: CapturedTower | None
    config: Any
    device: torch.device
    _signature: inspect.Signature
    _reader: PromptReader
    _report: RoutingReport
    _first_call_seconds: dict[str, float]
    _fingerprints: tuple[Fingerprint, ...] = ()

    @property
    def report(self) -> RoutingReport:
        """What was matched and rewritten, what it saves, and how often it was compiled so far."""
        compiling = {
            f"compiling {name}": program.compile_seconds
            for name, program in self.programs.items()
            if program.compilations
        }
        seconds = {**self._report.seconds, **compiling, **self._first_call_seconds}
        compilations = {name: program.compilations for name, program in self.programs.items()}
        return replace(self._report, seconds=seconds, compilations=compilations)

    @one_at_a_time
    @torch.no_grad()
    def routed_forward(self, unrouted: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.check_parts()
        given = self._signature.bind(self, *args, **kwargs).arguments
        more = given.pop("kwargs", {})
        call = self._reader.read({**given, **more}, self.device)
        self._forget_position_offset()
        start = time.perf_counter()
        token = current_call.set(call or UNROUTED)
        try:
            output = unrouted(*args, **kwargs)
        except ValueError as error:
            if "do not match" in str(error):
                raise InputError(
                    f"{error}. Pass input_ids and pixel_values as the processor returned them."
                ) from error
            raise
        finally:
            current_call.reset(token)
        if call is None:
            return output
        if not call.is_done:
            raise RerouteError(
                f"The call ended without running the routed decoder of {type(self).__name__}; expected the model's "
                f"forward to run it. Was a forward inside the routed model replaced? Take that off."
            )
        if call.commit:
            call.commit()
        self._first_call_seconds.setdefault(
            f"first {'prefill' if isinstance(call, Prompt) else 'continuation'}", time.perf_counter() - start
        )
        if isinstance(call, Prompt) and not isinstance(output, tuple):
            output.routing = call.routing
        return output

    def check_parts(self) -> None:
        """Raise InputError unless the model and the one that it was made from consist of what was compiled."""
        changed = next((path for held in self._fingerprints if (path := held.changed())), None)
        if changed:
            raise InputError(
                f"{changed} is no longer what it was when the model was compiled (replaced, moved, cast, or another "
                f"adapter); the compiled programs still have the old one. Call reroute_fx.compile again."
            )

    def _forget_position_offset(self) -> None:
        """Let no call see the positions of the prompt before it.

        Qwen2.5-VL keeps the offset of its last image prompt on the module and adds it to whatever follows, be it
        another conversation. Here the cache knows its positions.
        """
        if hasattr(self.base_model, "rope_deltas"):
            self.base_model.rope_deltas = None

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """See the model's own `generate`. Bad inputs are refused before the images are encoded."""
        given = kwargs if inputs is None else {**kwargs, "input_ids": inputs}
        self._reader.check_generate(given, self.device)
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def visualize(
        self, inputs: Mapping[str, Any], path: str | Path, processor: Any = None, **options: Any
    ) -> Path:
        """Draw which visual tokens of each prompt ran through each stage: see `reroute_fx.visualize`."""
        # Drawing comes after the runtime; this is a shorter way to it for those who hold a model.
        from ..visualizing import visualize

        return visualize(self, inputs, path, processor, **options)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save the model that was routed: what is written is of its class, and loads as it. See `original`."""
        saved = self.original.__new__(self.original)
        saved.__dict__.update(self.__dict__)
        return saved.save_pretrained(*args, **kwargs)

    def train(self, mode: bool = True) -> "RoutedModel":
        if mode:
            raise InputError(
                "train() was called on a routed model, which is for inference only. Train the model that was compiled, "
                "then compile it again."
            )
        return super().train(False)

    def _apply(self, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "RoutedModel":
        """Called by `to` and its like."""
        changed = change(torch.empty(0, dtype=self.dtype, device=self.device))
        if (changed.dtype, changed.device) != (self.dtype, self.device):
            raise InputError(
                f"A routed model can't be moved or cast: it is {self.dtype} on {self.device}, as its programs are. "
                f"{self._instead_of_moving}"
            )
        return self

    _instead_of_moving = "Move or cast the model that was compiled, then compile it again."

    def resize_token_embeddings(self, *_: Any, **__: Any) -> Any:
        raise InputError(
            "resize_token_embeddings was called on a routed model, whose parameters are those of another. Resize the "
            "model that was compiled, then compile it again."
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InputError(
            "A routed model can't be pickled or copied: its programs are compiled code. Write it with "
            "reroute_fx.export and load that, or compile the model again where it is needed."
        )

    @one_at_a_time
    def _maybe_prepare_encoder_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Called by `generate` to encode pictures."""
        return super()._maybe_prepare_encoder_kwargs_for_generation(*args, **kwargs)  # type: ignore[misc]

    @one_at_a_time
    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._forget_position_offset()
        return super()._prepare_position_ids_for_generation(*args, **kwargs)  # type: ignore[misc, no-any-return]

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any
    ) -> None:
        """Called by `generate` before anything runs."""
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise InputError(
                "generate was asked for assisted generation (assistant_model or prompt_lookup_num_tokens); expected "
                "one token at a time: a guess behind the prompt would change what is selected. Leave it out."
            )
        if generation_config.prefill_chunk_size is not None:
            raise InputError(
                "generate was asked for prefill_chunk_size; expected the whole prompt at once: its last token selects. "
                "Leave it out."
            )
        super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, *args
        )
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, DynamicCache) and not cache.offloading:
            # The last token is generated but not cached.
            RoutedCache.adopt(cache).expected_length = generation_config.max_length - 1


class _ImageFeatures:
    """Stands in for `get_image_features` of a model whose pictures are reduced.

    Features that are gone are rows of -inf, so that there is one for each placeholder still.
    """

    def __init__(self, tower: CapturedTower, program: Executable | TensorRTProgram, config: Any) -> None:
        self.tower, self.program, self.config = tower, program, config

    def __call__(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor | None = None, **given: Any
    ) -> BaseModelOutputWithPooling:
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            expected = getattr(self.config, name, None)
            if given.get(name) not in (None, expected):
                raise InputError(
                    f"{name} is {given[name]!r}; expected {expected!r}, with which the vision tower was compiled. "
                    f"Leave it out."
                )
        images, grid = self.tower.images, None if image_grid_thw is None else image_grid_thw.cpu()
        images.check(pixel_values, grid)
        features = self.program(**images.inputs(pixel_values.contiguous(), grid))["features"]
        return BaseModelOutputWithPooling(
            pooler_output=list(features.split(images.sizes(pixel_values, grid)))
        )


def make_routed_model(
    model: PreTrainedModel,
    decoder: PreTrainedModel,
    prefill: Executable | TensorRTProgram,
    continuation: Executable | TensorRTProgram,
    report: RoutingReport,
    *,
    position_rank: int,
    visual_ids: tuple[int, ...],
    limits: Limits | None = None,
    tower: CapturedTower | None = None,
    images: Executable | TensorRTProgram | None = None,
) -> Any:
    """A `RoutedModel` that shares the parameters of `model`; neither `model` nor `decoder` is changed."""
    owner = uuid.uuid4().hex
    routed = copy_sharing_weights(model)
    inner = specialize(text_decoder(routed), RoutedDecoder)
    inner.prefill, inner.continuation = prefill, continuation
    inner.routing_config = report.config
    inner.position_rank = position_rank
    inner.owner = owner
    inner.uses_buckets = prefill.cuda_graphs is not None
    specialize(routed, RoutedModel)
    routed.routing_config = report.config
    routed._signature = inspect.signature(type(model).forward)
    routed._reader = PromptReader(routed.config, report.config, visual_ids, owner, limits=limits)
    routed._report = report
    routed.programs = {"prefill": prefill, "continuation": continuation}
    routed.tower = tower
    if tower is not None and images is not None:
        routed.programs["images"] = images
        routed.base_model.get_image_features = _ImageFeatures(tower, images, routed.config)
    routed._first_call_seconds = {}
    compiled = routed if tower is not None else inner
    routed._fingerprints = Fingerprint(model, "model"), Fingerprint(compiled, "routed")
    return routed
