"""The routed model that users hold."""

import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import DynamicCache
from transformers.generation import GenerationMode

from ..analysis.routing_report import RoutingReport
from ..capture.fingerprint import Fingerprint
from ..capture.vision_tower import CapturedTower
from ..common.turns import one_at_a_time
from ..config.routing_config import RoutingConfig
from ..errors import InputError, RerouteError
from ..lowering import Executable, TensorRTProgram
from ..selection.selection_result import Routing
from .cache import RoutedCache
from .call_checks import refuse_gradients
from .prompt import GRIDS, Prompt, PromptReader, TokensOnCache, generated_grids, read_ahead, without_grids
from .routed_decoder import UNROUTED_CALL, current_call

_checked: ContextVar[Any] = ContextVar("_checked", default=None)
"""The model whose parts need not be looked at: its `generate` or `SlotPool.step` is running."""
_DYNAMIC_CACHES = (None, "dynamic", "dynamic_full", "offloaded", "quantized")
"""Names of caches that grow; the decoder says which of them it takes."""


@contextmanager
def _set(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


class RoutedOutput(Protocol):
    """What a call of a routed model returns: the model's own output class, with what was routed.

    Attributes:
        logits: ``[B, S, vocabulary]``.
        loss: of ``labels``, if they were given.
        past_key_values: the cache, unless none was wanted.
        routing: what was selected; there after prompts with visual tokens only.
    """

    logits: torch.Tensor
    loss: torch.Tensor | None
    past_key_values: RoutedCache | None
    routing: Routing


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

    A prompt may come as ``inputs_embeds`` with its features in place: beside ``input_ids``, or with ``visual_mask``
    ``[B, S]`` bool, True for visual tokens; without both it is text. ``hidden_states`` are the residual stream before
    each layer and, last, the final norm's output, ``[B, S, d]`` each: rows that were deferred or deleted as they last
    ran, deferred ones with the visual features that layers added since. Losses of ``labels`` are given without
    gradients only.

    Attributes:
        routing_config: what is routed.
        programs: the routed programs, ``"prefill"`` and ``"continuation"``, and ``"images"`` if the method reduces
            pictures.
        tower: the vision tower with the reduction; None without one.
        original: class that it was made from; None for a model from an artifact.
    """

    if TYPE_CHECKING:
        # The class that it was made from has more than type checkers can know of.
        def __call__(self, *args: Any, **kwargs: Any) -> RoutedOutput: ...
        def __getattr__(self, name: str) -> Any: ...

    original: type | None = None
    _instead_of_moving = "Move or cast the model that was compiled, then compile it again."
    routing_config: RoutingConfig
    programs: dict[str, Executable | TensorRTProgram]
    tower: CapturedTower | None
    config: Any
    device: torch.device
    dtype: torch.dtype
    _signature: inspect.Signature
    _reader: PromptReader
    _report: RoutingReport
    _first_call_seconds: dict[str, float]
    _stream_programs: dict[str, Executable | TensorRTProgram]
    _fingerprints: tuple[Fingerprint, ...] = ()
    _programmed: tuple[Fingerprint, ...] = ()

    @property
    def report(self) -> RoutingReport:
        """What was matched and rewritten, what it saves, and how often it was compiled so far."""
        programs = {**self.programs, **self._stream_programs}
        compiling = {
            f"compiling {name}": program.compile_seconds
            for name, program in programs.items()
            if program.compilations
        }
        seconds = {**self._report.seconds, **compiling, **self._first_call_seconds}
        compilations = {name: program.compilations for name, program in programs.items()}
        attention = {
            name: ", ".join(program.attention)
            for name, program in programs.items()
            if isinstance(program, Executable) and program.attention
        }
        return replace(self._report, seconds=seconds, compilations=compilations, attention=attention)

    @one_at_a_time
    def routed_forward(self, unrouted: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if _checked.get() is not self:
            self.check_parts()
        bound = self._signature.bind(self, *args, **kwargs).arguments
        more = bound.pop("kwargs", {})
        del bound["self"]
        given = {**bound, **more}
        refuse_gradients(given)
        with torch.no_grad():
            return self._run_call(unrouted, given)

    def _run_call(self, unrouted: Callable[..., Any], given: Mapping[str, Any]) -> Any:
        call = self._reader.read(given, self.device)
        self._forget_position_offset()
        arguments = self._arguments(given, call)
        start = time.perf_counter()
        try:
            with _set(current_call, call or UNROUTED_CALL):
                output = unrouted(**arguments)
        except ValueError as error:
            if "do not match" in str(error):
                raise InputError(
                    f"{error}. Pass input_ids and pixel_values as the processor returned them."
                ) from error
            raise
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

    @property
    def cache_owner(self) -> str:
        """Identity that caches of this model carry."""
        return self._reader.owner

    @contextmanager
    def parts_checked(self) -> Iterator[None]:
        """Calls inside don't look at the model's parts, for whoever runs them did: it takes a 7B half a millisecond."""
        with _set(_checked, self):
            yield

    def check_parts(self) -> None:
        """Raise InputError unless the model and the one that it was made from consist of what was compiled."""
        changed = next((path for held in self._fingerprints if (path := held.changed())), None)
        if changed:
            raise InputError(
                f"{changed} is no longer what it was when the model was compiled (replaced, moved, cast, or another "
                f"adapter); the compiled programs still have the old one. Call reroute_fx.compile again."
            )
        hooked = next((path for held in self._programmed if (path := held.hooked())), None)
        if hooked:
            raise InputError(
                f"{hooked} got a forward hook, which does not run: the decoder's parts are compiled into programs. "
                f"Remove it; hidden states come with output_hidden_states=True."
            )

    def _arguments(self, given: Mapping[str, Any], call: Prompt | TokensOnCache | None) -> dict[str, Any]:
        """What the model itself takes of a call; it wants either ids or embeddings."""
        arguments = {name: value for name, value in given.items() if name != "visual_mask"}
        if isinstance(call, TokensOnCache):
            # The cache knows the positions behind its pictures.
            arguments = without_grids(arguments)
        if given.get("input_ids") is not None and given.get("inputs_embeds") is not None:
            if isinstance(call, Prompt) and given.get("position_ids") is None:
                arguments["position_ids"] = self._positions_of(given)
            arguments["input_ids"] = None
        return arguments

    def _positions_of(self, given: Mapping[str, Any]) -> torch.Tensor | None:
        """Rotary positions of a prompt that the model will not see the ids of; None if they count its tokens."""
        if self._reader.position_rank == 2:
            return None
        compute = getattr(self.base_model, "compute_3d_position_ids", None)
        positions = None
        if compute is not None:
            names = inspect.signature(compute).parameters
            positions = compute(**{name: given.get(name) for name in names})
        if positions is None:
            raise InputError(
                "The prompt came as inputs_embeds, and its positions in time, height and width don't follow from what "
                "was given; expected the grids and mm_token_type_ids that the processor returned, or position_ids."
            )
        self._forget_position_offset()
        return positions  # type: ignore[no-any-return]

    def _forget_position_offset(self) -> None:
        """Let no call see the positions of the prompt before it.

        Qwen2.5-VL keeps the offset of its last image prompt on the module and adds it to whatever follows, be it
        another conversation. Here the cache knows its positions.
        """
        if hasattr(self.base_model, "rope_deltas"):
            self.base_model.rope_deltas = None

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """See the model's own `generate`. Bad inputs are refused before the images are encoded."""
        self.check_parts()
        given = kwargs if inputs is None else {**kwargs, "input_ids": inputs}
        ahead = self._reader.check_generate(given, self.device)
        cache = given.get("past_key_values")
        if isinstance(cache, RoutedCache) and cache.rows:
            kwargs = without_grids(kwargs)
        elif given.get("input_ids") is not None and given.get("inputs_embeds") is not None:
            # The prompt's forward gets the embeddings alone.
            kwargs = {**kwargs, "visual_mask": self._reader.is_visual(given["input_ids"])}
        grids = {name: given[name] for name in GRIDS if given.get(name) is not None}
        with self.parts_checked(), _set(read_ahead, ahead), _set(generated_grids, grids):
            return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        if not self._reader.routes_text:
            model_kwargs = {name: value for name, value in model_kwargs.items() if name != "visual_mask"}
        super()._validate_model_kwargs(model_kwargs)  # type: ignore[misc]

    def visualize(
        self, inputs: Mapping[str, Any], path: str | Path, processor: Any = None, **options: Any
    ) -> Path:
        """Draw which visual tokens of each prompt ran through each stage: see `reroute_fx.visualize`."""
        # Drawing comes after the runtime; this is a shorter way to it for those who hold a model.
        from ..visualizing import visualize

        return visualize(self, inputs, path, processor, **options)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save the model that was routed: what is written is of its class, and loads as it."""
        if self.original is None:
            raise InputError(
                "save_pretrained was called on a model from an artifact, which has no model class. Copy the artifact's "
                "folder."
            )
        saved: Any = object.__new__(self.original)
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

    def generate_batch(self, *_: Any, **__: Any) -> Any:
        raise InputError(
            "generate_batch was called on a routed model; expected generate: continuous batching keeps a paged cache, "
            "and a routed model one of its own. Pass a padded batch to generate."
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch

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
        if generation_config.cache_implementation not in _DYNAMIC_CACHES:
            raise InputError(
                f"cache_implementation is {generation_config.cache_implementation!r}; expected none: the layers of a "
                f"routed model cache different numbers of tokens, in a RoutedCache. Leave it out, and set it to None "
                f"in the generation_config."
            )
        super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, *args
        )
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, DynamicCache) and not cache.offloading:
            # The last token is generated but not cached.
            RoutedCache.adopt(cache).expected_length = generation_config.max_length - 1
