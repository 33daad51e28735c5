"""What each contender does, and how long it takes."""

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ..errors import InputError, UnsupportedModelError
from ..runtime import RoutedCache
from .workload import Workload

Result = TypeVar("Result")
_TOWERS = ("get_image_features", "get_video_features")


class TowerFeatures:
    """What the vision tower returned for a batch, to be given to every contender in its place."""

    def __init__(self) -> None:
        self._returned: dict[str, list[Any]] = {}

    @contextmanager
    def recorded(self, model: Any) -> Iterator[None]:
        """Keep what the tower of `model` returns.

        Raises:
            UnsupportedModelError: at the end, if it was not called.
        """

        def recording(name: str, encode: Callable[..., Any]) -> Callable[..., Any]:
            def encode_and_keep(*args: Any, **kwargs: Any) -> Any:
                features = encode(*args, **kwargs)
                self._returned.setdefault(name, []).append(features)
                return features

            return encode_and_keep

        towers = {name: getattr(model.base_model, name, None) for name in _TOWERS}
        with _replaced(model, {name: recording(name, encode) for name, encode in towers.items() if encode}):
            yield
        if not self._returned:
            raise UnsupportedModelError(
                f"{type(model).__name__} called neither of {', '.join(_TOWERS)}; expected a model that encodes its "
                f"images there. Its prefill can't be timed without its vision tower."
            )

    @contextmanager
    def replayed(self, model: Any) -> Iterator[None]:
        """Let `model` find the kept features where it would call its tower."""

        def replay(kept: Sequence[Any]) -> Callable[..., Any]:
            again = itertools.cycle(kept)
            return lambda *args, **kwargs: next(again)

        with _replaced(model, {name: replay(kept) for name, kept in self._returned.items()}):
            yield


@contextmanager
def _replaced(model: Any, functions: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Set methods on the module that the model's forward calls them on, and restore what was there."""
    base = model.base_model
    before = {name: base.__dict__[name] for name in functions if name in base.__dict__}
    try:
        base.__dict__.update(functions)
        yield
    finally:
        for name in functions:
            base.__dict__.pop(name, None)
        base.__dict__.update(before)


@dataclass
class Contender:
    """A model at work on a batch. All calls run without gradients.

    Attributes:
        name: in results.
        model: takes the inputs of the workload.
        work: what is asked.
        token: that every step feeds, the same for all contenders, ``[B, 1]``.
        features: of the vision tower, for prefills without it.
    """

    name: str
    model: Any
    work: Workload
    token: torch.Tensor
    features: TowerFeatures

    def prefill(self) -> Any:
        """Output with the logits of each row's last token and a cache."""
        return self.model(**self.work.inputs, use_cache=True, logits_to_keep=1)

    def step(self, cache: Any, given: dict[str, torch.Tensor]) -> Any:
        """Output for one more token in each row, from `step_inputs`."""
        return self.model(**given, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def step_inputs(self, index: int) -> dict[str, torch.Tensor]:
        """Inputs of a step after this model's prefill; `index` counts the steps from 0."""
        mask = torch.nn.functional.pad(self.work.inputs["attention_mask"], (0, index + 1), value=1)
        given = {"input_ids": self.token, "attention_mask": mask}
        offset = getattr(self.model.base_model, "rope_deltas", None)
        if offset is not None:
            # Left alone, Qwen's forward computes positions for the whole mask and fails on a single token.
            positions = mask.sum(dim=1, keepdim=True) - 1 + offset
            given["position_ids"] = positions.expand(3, *positions.shape)
        return given

    def generate(self) -> torch.Tensor:
        """Token ids of exactly as many new tokens as asked for: no end of sequence counts before."""
        count, settings = self.work.new_tokens, self.model.generation_config
        pad = settings.pad_token_id if settings.pad_token_id is not None else 0
        ids: torch.Tensor = self.model.generate(
            **self.work.inputs,
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
        )
        made = ids.shape[1] - self.work.columns
        if made != count:
            raise InputError(
                f"generate returned {made} new tokens with the {self.name} model; expected {count}. Remove limits such "
                f"as max_time from model.generation_config."
            )
        return ids

    def make_room(self, cache: Any) -> None:
        """Announce all steps, so that a routed cache is allocated at the first of them, once."""
        if isinstance(cache, RoutedCache):
            cache.expected_length = self.work.columns + self.work.new_tokens + 1


def timed(run: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """Result of a call and its wall-clock seconds, with all that it started on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


def time_first_token(contender: Contender) -> dict[str, list[float]]:
    _, seconds = timed(contender.prefill, contender.model.device)
    return {"first_token": [seconds]}


def time_decoder(contender: Contender) -> dict[str, list[float]]:
    """The prefill on features that are there already, and each step on the cache that it leaves."""
    device = contender.model.device
    with contender.features.replayed(contender.model):
        output, prefill = timed(contender.prefill, device)
    cache = output.past_key_values
    contender.make_room(cache)
    calls = [contender.step_inputs(index) for index in range(contender.work.new_tokens + 1)]
    contender.step(cache, calls[0])  # allocates the room
    steps = [timed(functools.partial(contender.step, cache, given), device)[1] for given in calls[1:]]
    return {"first_token_without_tower": [prefill], "decode_step": steps}


def time_generate(contender: Contender) -> dict[str, list[float]]:
    _, seconds = timed(contender.generate, contender.model.device)
    return {"generate": [seconds]}


Measurement = Callable[[Any], dict[str, list[float]]]
Seconds = dict[str, dict[str, list[list[float]]]]
"""Samples by contender, measure, round and order."""

MEASUREMENTS: tuple[Measurement, ...] = (time_first_token, time_decoder, time_generate)


def alternate(
    contenders: Sequence[Any], measurements: Sequence[Measurement], rounds: Iterator[int] | range
) -> Seconds:
    """Measure all contenders in every round.

    Each measurement is taken of all contenders in turn before the next one begins, so that what slows the machine
    slows all of them. Each round starts with another contender.
    """
    seconds: Seconds = {contender.name: {} for contender in contenders}
    for number in rounds:
        first = number % len(contenders)
        for measure in measurements:
            for contender in (*contenders[first:], *contenders[:first]):
                for name, samples in measure(contender).items():
                    seconds[contender.name].setdefault(name, []).append(samples)
    return seconds
