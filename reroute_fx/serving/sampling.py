"""The next token of a row, as `generate` chooses it for that row alone."""

import functools
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

_ROW_BY_ROW = (
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
"""Processors that look at each row of logits alone, and at no token that came before."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is chosen, and when it ends.

    Attributes:
        tokens: the most that it may have.
        temperature: 0 for the likeliest token; None for what the model's generation config says.
        top_p: the likeliest tokens with this share of the probability; None as above. Below 1 it asks for sampling,
            unless `temperature` is 0.
        seed: of the first answer to a prompt, the second has the next number; None for any.
        stop: texts before which an answer ends.
        logprobs: alternatives that are told with each token; None to tell no probabilities.
        ignores_end: whether an answer goes on behind a token that ends one.
        tells_special: whether the text of an answer has special tokens in it.
    """

    tokens: int
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignores_end: bool = False
    tells_special: bool = False


class Choice(NamedTuple):
    """A token that was chosen, with log probabilities before temperature and top_p.

    Attributes:
        token: its id.
        logprob: its own; None if none are told.
        alternatives: the likeliest tokens with theirs, best first.
    """

    token: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


class TokenChooser:
    """How the tokens of one row are chosen, with transformers' own processors of logits, which `generate` uses.

    Args:
        model: whose generation config is asked.
        sampling: how to choose.
        number: of the answer, among those to its prompt.
        prompt: token ids of the prompt, ``[1, S]`` int64.

    Attributes:
        ends: ids that end an answer.
        processors: of logits.
        samples: whether tokens are drawn; otherwise the likeliest is taken.
        generator: of the random numbers of this row.
        logprobs: alternatives that are told with each token; None to tell none.
        ids: the prompt, and the answer as far as processors look at it, ``[1, S']``.
        looks_back: whether some processor looks at those.
        alike: rows of a model with an equal one may go through the processors together.
    """

    def __init__(self, model: Any, sampling: Sampling, number: int, prompt: torch.Tensor) -> None:
        config = self._config(model, sampling)
        model._prepare_special_tokens(config, device=prompt.device)
        self.processors = model._get_logits_processor(
            config, input_ids_seq_length=prompt.shape[1], device=prompt.device
        )
        ends = config.eos_token_id
        self.ends = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
        if sampling.ignores_end:
            self.ends = frozenset()
        self.samples, self.logprobs = bool(config.do_sample), sampling.logprobs
        self.ids = prompt
        self.generator = torch.Generator(prompt.device)
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed + number)
        self.looks_back = not all(isinstance(processor, _ROW_BY_ROW) for processor in self.processors)
        self.alike: Hashable = self if self.looks_back else (sampling.temperature, sampling.top_p)

    @staticmethod
    def _config(model: Any, sampling: Sampling) -> Any:
        given: dict[str, Any] = {}
        if sampling.temperature is not None:
            given["do_sample"] = sampling.temperature > 0
        elif sampling.top_p is not None and sampling.top_p < 1:
            given["do_sample"] = True
        if given.get("do_sample", model.generation_config.do_sample):
            asked = {"temperature": sampling.temperature, "top_p": sampling.top_p}
            given |= {name: value for name, value in asked.items() if value is not None}
            if model.generation_config.top_k is None:
                # transformers' own 50 is nothing that the API knows of.
                given["top_k"] = 0
        config, _ = model._prepare_generation_config(None, **given)
        return config


def choose_tokens(
    choosers: Mapping[int, TokenChooser], logits: torch.Tensor
) -> tuple[torch.Tensor, dict[int, Choice]]:
    """The next token of each row, by logits ``[rows, V]`` of one model. The device is waited for once.

    Of the tensor ``[rows]`` of tokens, which stays on the device, those of rows without a chooser mean nothing.

    Rows that are alike go through the processors and are drawn together, each with random numbers of its own: the
    operators see rows one by one, so that none knows of the others.
    """
    alike: dict[Hashable, list[int]] = {}
    told = []
    for row in sorted(choosers):
        chooser = choosers[row]
        if chooser.samples or chooser.processors:
            alike.setdefault(chooser.alike, []).append(row)
        if chooser.logprobs is not None:
            told.append(row)
    drawn = _draw_all(choosers, alike.values(), logits)
    if told:
        where = _where(told, logits.device)
        logprobs = logits[where].float().log_softmax(-1)
        return drawn, _with_logprobs(choosers, drawn, told, drawn[where], logprobs)
    tokens = drawn.tolist()
    return drawn, {row: Choice(tokens[row]) for row in choosers}


def _draw_all(
    choosers: Mapping[int, TokenChooser], alike: Collection[Sequence[int]], logits: torch.Tensor
) -> torch.Tensor:
    """The tokens ``[rows]`` of rows that are alike, of each group, and the likeliest ones of all others."""
    if [len(rows) for rows in alike] == [len(logits)]:
        return _choose_alike([choosers[row] for row in next(iter(alike))], logits.float())
    drawn = logits.argmax(-1)
    for rows in alike:
        where = _where(rows, logits.device)
        drawn[where] = _choose_alike([choosers[row] for row in rows], logits[where].float())
    return drawn


def _where(rows: Sequence[int], device: torch.device) -> slice | torch.Tensor:
    """Ascending rows as an index: a slice if they lie side by side, otherwise on the device.

    That is not waited for: it is busy with the step.
    """
    if rows[-1] - rows[0] == len(rows) - 1:
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, pin_memory=device.type == "cuda").to(device, non_blocking=True)


@torch.inference_mode()
def _choose_alike(choosers: Sequence[TokenChooser], scores: torch.Tensor) -> torch.Tensor:
    first = choosers[0]
    # Not all at once, as a LogitsProcessorList: it asks each for its signature every time.
    for process in first.processors:
        scores = process(first.ids, scores)
    if first.samples:
        drawn = draw(scores.softmax(-1), [chooser.generator for chooser in choosers])
    else:
        drawn = scores.argmax(-1)
    if first.looks_back:
        first.ids = torch.cat([first.ids, drawn[None]], dim=1)
    return drawn


def draw(shares: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """What ``torch.multinomial(shares[i], 1, generator=generators[i])`` draws for each row of ``[R, V]``: ``[R]``.

    A token wins whose share, over a number from the exponential distribution, is the largest: that is how torch draws
    one number, and only the random ones have to be drawn row by row.
    """
    noise = torch.empty_like(shares)
    for row, generator in zip(noise, generators, strict=True):
        row.exponential_(generator=generator)
    return torch.div(shares, noise, out=noise).argmax(-1)


def _with_logprobs(
    choosers: Mapping[int, TokenChooser],
    drawn: torch.Tensor,
    told: Sequence[int],
    of_told: torch.Tensor,
    logprobs: torch.Tensor,
) -> dict[int, Choice]:
    """Choices of all rows; those of `told` with log probabilities ``[told, V]`` of their tokens ``[told]``."""
    most = max(choosers[row].logprobs or 0 for row in told)
    best, ids = logprobs.topk(min(most, logprobs.shape[-1]))
    own = logprobs.gather(-1, of_told[:, None])
    tokens, found = drawn.tolist(), zip(told, own.tolist(), best.tolist(), ids.tolist(), strict=True)
    choices = {row: Choice(tokens[row]) for row in choosers}
    for row, (logprob,), values, others in found:
        alternatives = tuple(zip(others, values, strict=True))[: choosers[row].logprobs]
        choices[row] = Choice(tokens[row], logprob, alternatives)
    return choices


def token_decoder(tokenizer: Any, tells_special: bool = False) -> Callable[[Sequence[int]], str]:
    """What `tokenizer.decode` makes of tokens, without special ones unless they are to be told.

    Less what that looks for in its arguments, if it can be: it takes longer than all else that a token costs.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or tokenizer.clean_up_tokenization_spaces:
        backend = tokenizer
    return functools.partial(backend.decode, skip_special_tokens=not tells_special)


class TextStream:
    """The text of an answer, as far as it can be told while tokens come.

    A character that takes several tokens is told when it is whole, and nothing is told that may be the beginning of a
    text before which the answer ends.

    Args:
        decode: token ids to text.
        stop: texts before which the answer ends.

    Attributes:
        stopped: whether such a text came.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._ids: list[int] = []
        self._start = self._read = 0
        self._before = self._held = ""
        self._decoded: list[str] = []
        self.stopped = False

    def add(self, token: int) -> str:
        """What can be told after one more token; empty if nothing new can be."""
        self._ids.append(token)
        now = self._decode(self._ids[self._start :])
        if len(now) <= len(self._before) or now.endswith("\ufffd"):
            return ""
        new = now[len(self._before) :]
        self._start, self._read = self._read, len(self._ids)
        self._before = self._decode(self._ids[self._start :])
        return self._tell(new)

    def end(self) -> str:
        """What was held back, when no more tokens come."""
        if self.stopped:
            return ""
        whole, decoded = self._decode(self._ids), "".join(self._decoded)
        rest = whole[len(decoded) :] if whole.startswith(decoded) else ""
        told = self._tell(rest)
        if not self.stopped:
            told, self._held = told + self._held, ""
        return told

    def _tell(self, new: str) -> str:
        self._decoded.append(new)
        if not self._stop:
            return new
        text = self._held + new
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        told, self._held = text[: len(text) - held], text[len(text) - held :]
        return told


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
