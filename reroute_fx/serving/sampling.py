"""The next token of a row, as `generate` chooses it for that row alone."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


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
    """

    tokens: int
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class Choice:
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
    """Chooses the tokens of one row with transformers' own processors of logits, which `generate` uses.

    Args:
        model: whose generation config is asked.
        sampling: how to choose.
        number: of the answer, among those to its prompt.
        prompt: token ids of the prompt, ``[1, S]`` int64.

    Attributes:
        ends: ids that end an answer.
    """

    def __init__(self, model: Any, sampling: Sampling, number: int, prompt: torch.Tensor) -> None:
        config = self._config(model, sampling)
        model._prepare_special_tokens(config, device=prompt.device)
        self._processors = model._get_logits_processor(
            config, input_ids_seq_length=prompt.shape[1], device=prompt.device
        )
        ends = config.eos_token_id
        self.ends = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
        self._samples, self._logprobs = bool(config.do_sample), sampling.logprobs
        self._is_plain = not self._samples and not self._processors and self._logprobs is None
        self._ids = prompt
        self._generator = torch.Generator(prompt.device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed + number)

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

    def choose(self, logits: torch.Tensor, likeliest: int | None = None) -> Choice:
        """A token by logits ``[V]``, of which `likeliest` is the highest if that is known."""
        if self._is_plain and likeliest is not None:
            return Choice(likeliest)
        scores = logits.float()
        told = scores
        if self._processors:
            scores = self._processors(self._ids, scores[None])[0]
        if self._samples:
            drawn = torch.multinomial(scores.softmax(-1), 1, generator=self._generator)
        else:
            drawn = scores.argmax(-1, keepdim=True)
        if self._processors:
            self._ids = torch.cat([self._ids, drawn[None]], dim=1)
        token = int(drawn)
        return Choice(token) if self._logprobs is None else _with_logprobs(token, told, self._logprobs)


def _with_logprobs(token: int, logits: torch.Tensor, alternatives: int) -> Choice:
    logprobs = logits.log_softmax(-1)
    best, ids = logprobs.topk(min(alternatives, len(logprobs)))
    return Choice(token, float(logprobs[token]), tuple(zip(ids.tolist(), best.tolist(), strict=True)))


def token_decoder(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """What `tokenizer.decode` makes of tokens without special ones.

    Less what that looks for in its arguments, if it can be: it takes longer than all else that a token costs.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or tokenizer.clean_up_tokenization_spaces:
        backend = tokenizer
    return functools.partial(backend.decode, skip_special_tokens=True)


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
        self._decoded = self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What can be told after one more token; empty if nothing new can be."""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._read])
        now = self._decode(self._ids[self._start :])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._tell(now[len(before) :])

    def end(self) -> str:
        """What was held back, when no more tokens come."""
        if self.stopped:
            return ""
        whole = self._decode(self._ids)
        rest = whole[len(self._decoded) :] if whole.startswith(self._decoded) else ""
        told = self._tell(rest)
        if not self.stopped:
            told, self._held = told + self._held, ""
        return told

    def _tell(self, new: str) -> str:
        self._decoded += new
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
