"""Answers as the OpenAI client reads them: whole, or in chunks."""

import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .answers import Part, Started
from .chat_request import ChatRequest
from .sampling import Choice


@dataclass
class ChatResponse:
    """The response to a request as its parts come.

    Attributes:
        request: what was asked.
        model: name of the model.
        tier: that answers.
        tokenizer: that turns tokens into text.
    """

    request: ChatRequest
    model: str
    tier: str
    tokenizer: Any
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    _prompt_tokens: int = 0
    _answer_tokens: int = 0

    def chunks(self, part: Part) -> list[dict[str, Any]]:
        """The chunks of a stream that a part makes."""
        if isinstance(part, Started):
            self._prompt_tokens = part.prompt_tokens
            opening = [
                self._chunk([_delta(number, {"role": "assistant", "content": ""})])
                for number in range(self.request.n)
            ]
            opening[0] |= self._reroute(part)
            return opening
        self._answer_tokens += 1
        if not (part.text or part.finish_reason or self.request.logprobs or self._counts_on):
            return []
        delta = {"content": part.text} if part.text else {}
        logprobs = self._logprobs([part.choice])
        return [self._chunk([_delta(part.number, delta, logprobs, part.finish_reason)])]

    def closing_chunks(self) -> list[dict[str, Any]]:
        """Those behind the answer: what it took, if that was asked for."""
        options = self.request.stream_options
        if options is None or not options.include_usage:
            return []
        return [self._chunk([]) | {"usage": self._usage()}]

    @property
    def _counts_on(self) -> bool:
        """Whether every chunk counts the tokens, and every token has a chunk."""
        options = self.request.stream_options
        return options is not None and options.continuous_usage_stats

    def whole(self, parts: Iterable[Part]) -> dict[str, Any]:
        """The response, of all parts."""
        texts = [""] * self.request.n
        tokens: list[list[Choice]] = [[] for _ in texts]
        reasons: list[str | None] = [None] * self.request.n
        more: dict[str, Any] = {}
        for part in parts:
            if isinstance(part, Started):
                self._prompt_tokens, more = part.prompt_tokens, self._reroute(part)
                continue
            self._answer_tokens += 1
            texts[part.number] += part.text
            tokens[part.number].append(part.choice)
            reasons[part.number] = part.finish_reason
        choices = [
            {
                "index": number,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": self._logprobs(tokens[number]),
                "finish_reason": reasons[number],
            }
            for number, text in enumerate(texts)
        ]
        return self._object("chat.completion") | {"choices": choices, "usage": self._usage()} | more

    def _object(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        counted = {"usage": self._usage()} if self._counts_on else {}
        return self._object("chat.completion.chunk") | {"choices": choices} | counted

    def _usage(self) -> dict[str, int]:
        prompt, answer = self._prompt_tokens, self._answer_tokens
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}

    def _reroute(self, started: Started) -> dict[str, Any]:
        """Which visual tokens each decision kept, by its layer, if that was asked for."""
        if not self.request.reroute.return_selection:
            return {}
        grids = [list(grid) for grid in started.grids]
        told: dict[str, Any] = {"tier": self.tier, "visual_tokens": [], "grids": grids, "selected": {}}
        if (routing := started.routing) is not None:
            told["visual_tokens"] = list(routing.plan.images[0])
            told["selected"] = {str(layer): rows[0].tolist() for layer, rows in routing.selected.items()}
        return {"reroute": told}

    def _logprobs(self, choices: Iterable[Choice]) -> dict[str, Any] | None:
        if not self.request.logprobs:
            return None
        return {"content": [self._logprob(choice) for choice in choices], "refusal": None}

    def _logprob(self, choice: Choice) -> dict[str, Any]:
        best = [self._token(token, logprob) for token, logprob in choice.alternatives]
        return self._token(choice.token, choice.logprob) | {"top_logprobs": best}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.tokenizer.decode([token])
        # The client's JSON has no infinities.
        value = max(logprob or 0.0, -9999.0)
        return {"token": text, "logprob": value, "bytes": list(text.encode())}


def _delta(
    number: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
) -> dict[str, Any]:
    return {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def error_body(message: str, kind: str, field: str | None = None) -> dict[str, Any]:
    """An error as the OpenAI client reads it."""
    return {"error": {"message": message, "type": kind, "param": field, "code": None}}
