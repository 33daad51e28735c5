"""Threads take turns.

Tracing and compiling patch what a process has only once (functions of transformers, settings of torch), and a routed
model keeps what the current call needs (static buffers of CUDA graphs, positions on modules of transformers). One lock
guards all of it.
"""

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Result = TypeVar("Result")

TURN = threading.RLock()
"""Whoever holds it is the only thread that captures, compiles, or runs a routed model."""


def one_at_a_time(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Let `function` run in one thread at a time, among all that are so marked; they may call each other."""

    @functools.wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        with TURN:
            return function(*args, **kwargs)

    return call
