"""The routed model that users hold."""

import inspect
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..config import RoutingConfig
from ..errors import InputError
from ..lowering import Executable
from ..report import RoutingReport
from .clone import clone, clone_path, specialize
from .decoder import RoutedDecoder, current_call
from .prompt import Prompt, read_call


class RoutedModel(torch.nn.Module):
    """A Hugging Face vision-language model with a routed decoder.

    It is an instance of the class it was made from, takes the same inputs and returns the same output
    class; `generate` is Hugging Face's. After a prompt with visual tokens the output also has ``.routing``,
    a `Routing`. Prompts without visual tokens run unrouted. Parameters are shared with the original model,
    which stays as it was. For inference only: outputs carry no gradients through the decoder.

    Attributes:
        routing_config: what is routed.
    """

    routing_config: RoutingConfig
    config: Any
    _visual_ids: tuple[int, ...]
    _report: RoutingReport
    _executable: Executable
    _first_prefill_seconds: float | None

    @property
    def report(self) -> RoutingReport:
        """What was matched and rewritten, and what it saves."""
        if self._first_prefill_seconds is None:
            return self._report
        seconds = {**self._report.seconds, "first prefill": self._first_prefill_seconds}
        return replace(self._report, seconds=seconds)

    def routed_forward(self, unrouted: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.training:
            raise InputError("The routed model is in training mode; expected inference. Call .eval() on it.")
        given = inspect.signature(unrouted).bind(*args, **kwargs).arguments
        given = {**given, **given.pop("kwargs", {})}
        call = read_call(given, self.routing_config, self._visual_ids)
        start = time.perf_counter()
        token = current_call.set(call)
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
        if isinstance(call, Prompt):
            if self._first_prefill_seconds is None:
                self._first_prefill_seconds = time.perf_counter() - start
            if not isinstance(output, tuple):
                output.routing = call.routing
        return output


def make_routed_model(
    model: PreTrainedModel,
    decoder: PreTrainedModel,
    executable: Executable,
    report: RoutingReport,
    *,
    position_rank: int,
    visual_ids: tuple[int, ...],
) -> Any:
    """A `RoutedModel` that shares the parameters of `model`; neither `model` nor `decoder` is changed."""
    inner = specialize(clone(decoder), RoutedDecoder)
    inner.executable = executable
    inner.routing_config = report.config
    inner.position_rank = position_rank
    routed = specialize(clone_path(model, decoder, inner), RoutedModel)
    routed.routing_config = report.config
    routed._visual_ids = visual_ids
    routed._report = report
    routed._first_prefill_seconds = None
    return routed
