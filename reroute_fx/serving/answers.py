"""What comes back for a request, from the thread that runs the model to whoever reads it."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ..selection.selection_result import Routing
from .refusals import SlowReaderError
from .sampling import Choice

_OF_EACH = 64
"""Bytes that a part of an answer counts besides its text, and each alternative."""


@dataclass(frozen=True)
class Started:
    """The prompt ran.

    Attributes:
        prompt_tokens: of the prompt.
        routing: what was selected; None for a prompt without pictures.
        grids: rows and columns of the visual tokens of each picture; empty if they lie in no grid.
    """

    prompt_tokens: int
    routing: Routing | None
    grids: tuple[tuple[int, int], ...] = ()


class Piece(NamedTuple):
    """A token of an answer, and the text that can be told with it.

    Attributes:
        number: of the answer, among those to its prompt.
        choice: the token.
        text: may be empty, and may be of earlier tokens too.
        finish_reason: ``"stop"`` or ``"length"`` with the last one.
    """

    number: int
    choice: Choice
    text: str
    finish_reason: str | None = None

    @property
    def size(self) -> int:
        """Bytes that it counts."""
        return len(self.text.encode()) + _OF_EACH * (1 + len(self.choice.alternatives))


Part = Started | Piece


class Answer:
    """All answers to a prompt as they grow: a mailbox from the model's thread to one reader.

    Args:
        notify: called, in the model's thread, when there is something to take and nothing was before, and at the end.

    Attributes:
        is_cancelled: whether the reader went.
    """

    def __init__(self, unread_bytes: int, notify: Callable[[], None] | None = None) -> None:
        self._most, self._notify = unread_bytes, notify
        self._parts: deque[Part] = deque()
        self._bytes = 0
        self._error: Exception | None = None
        self._ended = False
        self._changed = threading.Condition()
        self.is_cancelled = False

    def cancel(self) -> None:
        """Read no more: its rows are free before the next step."""
        self.is_cancelled = True

    def take(self) -> tuple[list[Part], bool]:
        """What came since the last call, and whether that was all.

        Raises:
            RerouteError: the answer failed, once all that came before was taken.
        """
        with self._changed:
            parts, self._bytes = list(self._parts), 0
            self._parts.clear()
            if self._error is not None and not parts:
                raise self._error
            return parts, self._ended and self._error is None

    def __iter__(self) -> Iterator[Part]:
        """All of it, waiting for what has not come yet."""
        ended = False
        while not ended:
            with self._changed:
                self._changed.wait_for(lambda: self._parts or self._ended)
            parts, ended = self.take()
            yield from parts

    @property
    def ended(self) -> bool:
        """Whether nothing more comes."""
        return self._ended

    @property
    def is_dropped(self) -> bool:
        """Whether too much of it was left unread."""
        return isinstance(self._error, SlowReaderError)

    def put(self, part: Part) -> None:
        """One more part. Beyond the most that may lie unread the answer fails."""
        with self._changed:
            is_first = not self._parts
            if isinstance(part, Piece):
                self._bytes += part.size
            if self._bytes > self._most and not self._ended:
                self._parts.clear()
                self._error = SlowReaderError(f"More than {self._most} bytes of the answer were left unread.")
                self._ended = True
            if not self._ended:
                self._parts.append(part)
            if is_first or self._ended:
                self._changed.notify_all()
        if is_first:
            self._tell()

    def end(self, error: Exception | None = None) -> None:
        """Nothing more comes, or it failed."""
        with self._changed:
            if not self._ended:
                self._error, self._ended = error, True
            self._changed.notify_all()
        self._tell()

    def _tell(self) -> None:
        if self._notify is not None:
            self._notify()
