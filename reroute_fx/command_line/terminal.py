"""What commands print, and how they refuse."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.logging import RichHandler

OUTPUT, MESSAGES = Console(), Console(stderr=True)
"""What a command is asked for, and what is told on the way."""


@contextmanager
def refusals() -> Iterator[None]:
    """Errors that are raised on purpose are told in one line, and end the command with exit code 1."""
    try:
        yield
    except Exception as error:
        from ..errors import RerouteError

        if not isinstance(error, RerouteError):
            raise
        message = f"{type(error).__name__}: {error}"
        MESSAGES.print(message, style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1) from error


@contextmanager
def logged(level: str) -> Iterator[None]:
    """Show what the package logs, from a level on: ``"debug"``, ``"info"``, ``"warning"`` or ``"error"``."""
    logger, handler = logging.getLogger("reroute_fx"), RichHandler(console=MESSAGES, show_path=False)
    before = logger.level
    logger.setLevel(level.upper())
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
