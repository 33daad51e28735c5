"""Between the regions of a program its caller may do something else, which can't wait for the whole program."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_between: ContextVar[Callable[[], None] | None] = ContextVar("between_regions", default=None)


@contextmanager
def between_regions(run: Callable[[], None] | None) -> Iterator[None]:
    """Let programs that run inside call `run` before each of their regions, or nothing for None.

    It may run other programs, or the same one: these don't pause. What it raises ends the program.
    """
    before = _between.set(run)
    try:
        yield
    finally:
        _between.reset(before)


def pause() -> None:
    """Called before each region."""
    run = _between.get()
    if run is not None:
        with between_regions(None):
            run()
