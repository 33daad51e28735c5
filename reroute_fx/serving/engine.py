"""Requests in, tokens out: many conversations on one routed model, in one thread.

Continuous batching: a request waits until its tier has rows for it, its prompt runs alone, and its keys and values go
into rows of the tier's `SlotPool`. A step then feeds one token to every row that holds an answer. Rows leave when they
end, and others take their place. A prompt takes many times as long as a step, so that steps run between its layers.
Each answer is what its prompt gets alone, whatever the others do.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from ..capture.cells import grids_of, has_cells
from ..common.pauses import between_regions
from ..errors import ConfigError, RerouteError
from ..loading.prompts import place
from ..runtime import RoutedModel, SlotPool
from ..runtime.slots import Slot
from ..selection.selection_result import Routing
from .answers import Answer, Piece, Started
from .bounds import Bounds
from .metrics import Metrics
from .refusals import DeadlineError, QueueFullError, RequestError, ServingError
from .sampling import Choice, Sampling, TextStream, TokenChooser, choose_tokens, token_decoder

logger = logging.getLogger(__name__)

_IDLE_SECONDS = 0.05
"""Between looks at deadlines while nothing runs."""

_ENDING = "The server is shutting down. Send the request to another, or later."


@dataclass(frozen=True)
class Tier:
    """A routed model with rows to decode in.

    Attributes:
        name: by which requests ask for it.
        model: from `reroute_fx.compile` or `reroute_fx.load`.
        pool: of its rows.
    """

    name: str
    model: RoutedModel
    pool: SlotPool


@dataclass(eq=False)
class _Request:
    """A request that waits or runs.

    Attributes:
        inputs: of the model, for one row.
        sampling: how to answer.
        answers: how many.
        tier: that runs it.
        answer: where parts go.
        arrived: when it came.
        deadline: when it fails.
        rows: that hold its answers; those that ended are gone.
    """

    inputs: Mapping[str, torch.Tensor]
    sampling: Sampling
    answers: int
    tier: Tier
    answer: Answer
    arrived: float
    deadline: float
    rows: list["_Row"] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.inputs.values())


class _NobodyWaitsError(Exception):
    """The request of a prompt that runs was cancelled, or is late."""


class _DeviceLostError(Exception):
    """The device computes no more: after some errors of CUDA all that follows fails."""


@dataclass(eq=False)
class _Row:
    """A row of a pool with the answer that grows in it."""

    request: _Request
    number: int
    slot: Slot
    chooser: TokenChooser
    text: TextStream
    tokens: int = 0
    told: float = 0.0

    @property
    def place(self) -> int:
        return self.slot.rows[0]


class Engine:
    """Answers requests in a thread of its own.

    First come, first served, within a tier; a request that waits for rows of its tier doesn't stop those of another.
    Prompts never starve answers: between two tokens of an answer lies at most one prompt, of any tier, and one step of
    each tier. Where the programs have compiled regions it is less: before a region of a prompt there is a step if the
    last one is as long ago as it took, so that prompt and answers get half of the time each. A request that is
    cancelled, late, or whose reader is slow leaves before the next step. When its device computes no more, the engine
    ends, and says so by `is_alive`.

    Args:
        tiers: of one model, the first one for requests that ask for none.
        tokenizer: that turns tokens into text.
        bounds: on what waits, and how long.
        metrics: that are kept.
    """

    def __init__(self, tiers: Sequence[Tier], tokenizer: Any, bounds: Bounds, metrics: Metrics) -> None:
        names = [tier.name for tier in tiers]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"tiers are {names}; expected one or more, each once.")
        self.tiers = {tier.name: tier for tier in tiers}
        self.bounds, self.metrics = bounds, metrics
        self._decoders = {special: token_decoder(tokenizer, special) for special in (False, True)}
        self._waiting: deque[_Request] = deque()
        self._waiting_bytes = 0
        self._rows: dict[str, list[_Row]] = {name: [] for name in names}
        # The last token of each row, on the device.
        self._tokens = {
            tier.name: torch.zeros(tier.pool.rows, dtype=torch.int64, device=tier.model.device)
            for tier in tiers
        }
        self._changed = threading.Condition()
        self._closed = False
        self._stepped = self._step_seconds = 0.0
        self._thread: threading.Thread | None = None
        for tier in tiers:
            metrics.rows.labels(tier.name).set(tier.pool.rows)
            metrics.cache_bytes.labels(tier.name).set(tier.pool.bytes)

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self._waiting and not any(self._rows.values())

    def start(self) -> None:
        """Answer, until `close`."""
        self._thread = threading.Thread(target=self._run, name="reroute_fx engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; what waits or runs fails."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._fail_all(ServingError(_ENDING))

    def submit(
        self,
        inputs: Mapping[str, torch.Tensor],
        sampling: Sampling,
        *,
        answers: int = 1,
        tier: str | None = None,
        seconds: float | None = None,
        notify: Callable[[], None] | None = None,
    ) -> Answer:
        """Let a request wait for its rows.

        Args:
            inputs: of the model, for one row, on any device.
            sampling: how to answer.
            answers: to the prompt; each has a row.
            tier: that runs it; None for the first.
            seconds: until its deadline; None, or more than `Bounds.seconds`, for those.
            notify: called in the engine's thread when there is something to take.

        Raises:
            RequestError: no such tier, more answers than it has rows, or a prompt that leaves no room for the answer.
            QueueFullError: too many requests wait, or too many bytes.
        """
        chosen = self.tier(tier)
        self._check_room(inputs, sampling, answers, chosen)
        now = time.monotonic()
        deadline = now + min(seconds or self.bounds.seconds, self.bounds.seconds)
        answer = Answer(self.bounds.unread_bytes, notify)
        request = _Request(inputs, sampling, answers, chosen, answer, now, deadline)
        with self._changed:
            if self._closed:
                raise ServingError(_ENDING)
            is_full = len(self._waiting) >= self.bounds.queue
            if is_full or self._waiting_bytes + request.bytes > self.bounds.queue_bytes:
                raise QueueFullError(
                    f"{len(self._waiting)} requests of {self._waiting_bytes} bytes wait, and no more may. Send "
                    f"it later."
                )
            self._waiting.append(request)
            self._count_waiting(request.bytes)
            self._changed.notify_all()
        return answer

    def step(self) -> bool:
        """One prompt at most, then a token for every row; whether there was anything to do."""
        self._drop_ended(self._requests())
        started = self._start_one()
        return self._step_all() or started

    def _run(self) -> None:
        while not self._closed:
            try:
                worked = self.step()
            except _DeviceLostError:
                logger.error("the device computes no more: the engine ends")
                self._closed = True
                self._fail_all(ServingError(_ENDING))
                return
            except Exception as error:  # Whatever it is, nobody may wait forever.
                _log("a step", error)
                self._fail_all(
                    ServingError(f"The model failed: {type(error).__name__}. Send the request again.")
                )
                continue
            if not worked:
                with self._changed:
                    self._changed.wait_for(lambda: self._waiting or self._closed, timeout=_IDLE_SECONDS)

    def tier(self, name: str | None) -> Tier:
        """The tier of a name, or the first for None.

        Raises:
            RequestError: there is none.
        """
        if name is None:
            return next(iter(self.tiers.values()))
        if name not in self.tiers:
            raise RequestError("reroute.tier", f"is {name}; expected one of {', '.join(self.tiers)}.")
        return self.tiers[name]

    def _check_room(
        self, inputs: Mapping[str, torch.Tensor], sampling: Sampling, answers: int, tier: Tier
    ) -> None:
        if not 1 <= answers <= tier.pool.rows:
            raise RequestError("n", f"is {answers}; expected 1 to {tier.pool.rows}, the rows of a tier.")
        length, capacity = inputs["input_ids"].shape[1], tier.pool.capacity
        if length + sampling.tokens > capacity:
            raise RequestError(
                "max_tokens",
                f"is {sampling.tokens} behind a prompt of {length} tokens; expected at most {capacity} together. Ask "
                f"for fewer, or send a shorter prompt.",
            )

    def _count_waiting(self, change: int) -> None:
        self._waiting_bytes += change
        self.metrics.waiting.set(len(self._waiting))
        self.metrics.waiting_bytes.set(self._waiting_bytes)

    def _drop_ended(self, requests: Iterable[_Request]) -> None:
        """Let those go that nobody waits for any more, or not so long."""
        now = time.monotonic()
        for request in requests:
            if request.answer.is_cancelled:
                self._end(request, "cancelled")
            elif request.answer.ended:
                self._end(request, "slow reader")
            elif now > request.deadline:
                seconds = request.deadline - request.arrived
                error = DeadlineError(
                    f"The answer was not done in {seconds:g} s. Ask for fewer tokens, or later."
                )
                self._end(request, "deadline", error)

    def _end(self, request: _Request, reason: str, error: Exception | None = None) -> None:
        """All of a request ends: its rows are free, and its reader knows."""
        self.metrics.answered.labels(reason).inc()
        with self._changed:
            if request in self._waiting:
                self._waiting.remove(request)
                self._count_waiting(-request.bytes)
        try:
            for row in list(request.rows):
                self._free(row)
        finally:
            request.answer.end(error)

    def _free(self, row: _Row) -> None:
        tier = row.request.tier
        row.request.rows.remove(row)
        self._rows[tier.name].remove(row)
        tier.pool.release(row.slot)
        self.metrics.rows_in_use.labels(tier.name).set(len(self._rows[tier.name]))

    def _start_one(self) -> bool:
        """Run the prompt of the first request whose tier has rows for it."""
        with self._changed:
            blocked: set[str] = set()
            for request in self._waiting:
                tier = request.tier
                if tier.name not in blocked and tier.pool.free >= request.answers:
                    self._waiting.remove(request)
                    self._count_waiting(-request.bytes)
                    break
                blocked.add(tier.name)
            else:
                return False
        try:
            self._start(request)
        except _NobodyWaitsError:
            self._drop_ended([request])
        except Exception as error:  # Out of memory, or a prompt that the model refuses: others go on.
            known = isinstance(error, RerouteError)
            if not known:
                _log("a prompt", error)
            self._fail_all(error if known else _failure(error), [request])
            _check_device(request.tier)
        return True

    @torch.no_grad()
    def _start(self, request: _Request) -> None:
        tier, inputs = request.tier, request.inputs
        placed = {name: place(tensor, tier.model) for name, tensor in inputs.items()}
        with between_regions(lambda: self._pause(request)):
            output = tier.model(**placed, logits_to_keep=1)
        prompt, mask = placed["input_ids"], placed.get("attention_mask")
        decode = self._decoders[request.sampling.tells_special]
        for number in range(request.answers):
            # What may fail comes first: a slot is the row's to free.
            chooser = TokenChooser(tier.model, request.sampling, number, prompt)
            slot = tier.pool.claim()
            row = _Row(request, number, slot, chooser, TextStream(decode, request.sampling.stop))
            request.rows.append(row)
            self._rows[tier.name].append(row)
            tier.pool.write(slot, output, attention_mask=mask)
        self.metrics.rows_in_use.labels(tier.name).set(len(self._rows[tier.name]))
        routing = getattr(output, "routing", None)
        self._count_prompt(tier, prompt.shape[1], routing)
        grids = _grids(tier.model.config, inputs, routing)
        request.answer.put(Started(prompt.shape[1], routing, grids))
        logits = output.logits[:1, -1].expand(request.answers, -1)
        drawn, choices = choose_tokens({row.number: row.chooser for row in request.rows}, logits)
        # A copy: what was drawn in inference mode can't be written to.
        self._tokens[tier.name] = self._tokens[tier.name].clone()
        for row in request.rows:
            self._tokens[tier.name][row.place] = drawn[row.number]
        self._take_all([(row, choices[row.number]) for row in request.rows])

    def _pause(self, request: _Request) -> None:
        """Before a region of a request's prompt: a step, if the last one is as long ago as it took."""
        if request.answer.is_cancelled or time.monotonic() > request.deadline:
            raise _NobodyWaitsError
        if time.monotonic() - self._stepped >= self._step_seconds:
            self._drop_ended(self._requests())
            self._step_all()

    def _count_prompt(self, tier: Tier, tokens: int, routing: Routing | None) -> None:
        self.metrics.prompt_tokens.inc(tokens)
        if routing is not None:
            self.metrics.visual_tokens.labels(tier.name).inc(sum(routing.plan.images[0]))
            for layer, kept in routing.selected.items():
                self.metrics.kept_visual_tokens.labels(tier.name, str(layer)).inc(len(kept[0]))

    def _step_all(self) -> bool:
        """A token for every row; whether there was one."""
        start, tiers = time.monotonic(), [tier for tier in self.tiers.values() if self._rows[tier.name]]
        for tier in tiers:
            self._step_rows(tier)
        self._stepped = time.monotonic()
        self._step_seconds = self._stepped - start
        return bool(tiers)

    @torch.no_grad()
    def _step_rows(self, tier: Tier) -> None:
        """A token for every row of a tier."""
        rows = self._rows[tier.name]
        choosers = {row.place: row.chooser for row in rows}
        try:
            logits = tier.pool.step(self._tokens[tier.name], [n in choosers for n in range(tier.pool.rows)])
            self._tokens[tier.name], choices = choose_tokens(choosers, logits)
        except Exception as error:
            _log(f"a step of tier {tier.name}", error)
            self._fail_all(_failure(error), _requests_of(rows))
            _check_device(tier)
            return
        self._take_all([(row, choices[row.place]) for row in rows])

    def _take_all(self, chosen: Sequence[tuple[_Row, Choice]]) -> None:
        """The next token of rows."""
        now = time.monotonic()
        self.metrics.answer_tokens.inc(len(chosen))
        for row, choice in chosen:
            if row.tokens:
                self.metrics.between_tokens.observe(now - row.told)
            else:
                self.metrics.first_token.observe(now - row.request.arrived)
            row.told = now
            self._take(row, choice)

    def _take(self, row: _Row, choice: Choice) -> None:
        """The next token of a row."""
        request = row.request
        row.tokens += 1
        finish, text = None, ""
        if choice.token in row.chooser.ends:
            finish = "stop"
        else:
            text = row.text.add(choice.token)
            if row.text.stopped:
                finish = "stop"
            elif row.tokens >= request.sampling.tokens:
                finish = "length"
        if finish:
            text += row.text.end()
            finish = "stop" if row.text.stopped else finish
            self._free(row)
        request.answer.put(Piece(row.number, choice, text, finish))
        if finish and not request.rows:
            request.answer.end()
            self.metrics.answered.labels("done").inc()

    def _fail_all(self, error: Exception, requests: Sequence[_Request] | None = None) -> None:
        """End requests, all for None."""
        for request in self._requests() if requests is None else requests:
            with suppress(Exception):  # To free rows takes the device, which may have failed.
                self._end(request, "failed", error)

    def _requests(self) -> list[_Request]:
        """All that wait, and all that run."""
        return [*self._waiting, *_requests_of(row for rows in self._rows.values() for row in rows)]


def _requests_of(rows: Iterable[_Row]) -> list[_Request]:
    """Each once, whose answers may have several rows."""
    return [*dict.fromkeys(row.request for row in rows)]


def _grids(
    config: Any, inputs: Mapping[str, torch.Tensor], routing: Routing | None
) -> tuple[tuple[int, int], ...]:
    """Rows and columns of the visual tokens of each picture of a prompt; empty if they lie in no grid."""
    if routing is None or not has_cells(config):
        return ()
    pictures = [[(config.image_token_id, tokens) for tokens in routing.plan.images[0]]]
    (grids,) = grids_of(config, inputs, pictures)
    return tuple((rows, columns) for _, rows, columns in grids)


def _check_device(tier: Tier) -> None:
    """Raise `_DeviceLostError` if the device of a tier computes no more."""
    if tier.model.device.type == "cuda":
        try:
            torch.cuda.synchronize(tier.model.device)
        except RuntimeError as error:
            raise _DeviceLostError from error


def _failure(error: Exception) -> ServingError:
    """What a reader is told: nothing of the message, which may speak of other requests."""
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
        return ServingError("There was not enough memory. Send a shorter prompt, smaller pictures, or later.")
    return ServingError(f"The model failed ({type(error).__name__}). Send the request again.")


def _log(what: str, error: Exception) -> None:
    """Without the message, which may hold words of a prompt, unless that is asked for."""
    logger.error("%s failed: %s", what, type(error).__name__)
    logger.debug("%s failed", what, exc_info=error)
