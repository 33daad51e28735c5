"""Where processor seconds of the tests go: with `--processor-seconds=FOLDER` each process writes what it measured.

FOLDER/tests-PID.jsonl has a line for each test, its seconds and processor seconds, those of child processes apart;
FOLDER/kinds-PID.json the processor seconds of the whole process by what they were spent on.
"""

import functools
import json
import os
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def add_options(parser: pytest.Parser) -> None:
    """`--processor-seconds`."""
    parser.addoption("--processor-seconds", type=Path, metavar="FOLDER", help="measure where they go")


def configure(config: pytest.Config) -> None:
    """Measure if that was asked for."""
    if folder := config.getoption("processor_seconds"):
        config.pluginmanager.register(Measure(folder))


def spent() -> tuple[float, float]:
    """Processor seconds of this process, and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time(), children.ru_utime + children.ru_stime


class Measure:
    """Wraps what takes time, and writes what it took."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.tests = folder / f"tests-{os.getpid()}.jsonl"
        self.kinds = folder / f"kinds-{os.getpid()}.json"
        self.seconds: Counter[str] = Counter()
        self.is_inside = False
        self.wrap_all()

    def wrap_all(self) -> None:
        """What is called inside of another kind counts as that one."""
        import torch
        from torch import _inductor
        from torch._inductor import compile_fx

        from reroute_fx.passes import Pass

        torch.export.export = self.wrap("export", torch.export.export)
        compile_fx.compile_fx = self.wrap("inductor", compile_fx.compile_fx)
        _inductor.aoti_compile_and_package = self.wrap("ahead_of_time", _inductor.aoti_compile_and_package)
        Pass.__call__ = self.wrap("passes", Pass.__call__)

    def wrap(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, measured."""

        @functools.wraps(function)
        def run(*given: Any, **named: Any) -> Any:
            if self.is_inside:
                return function(*given, **named)
            self.is_inside, before = True, spent()
            try:
                return function(*given, **named)
            finally:
                self.is_inside = False
                self.seconds[kind] += sum(spent()) - sum(before)

        return run

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Write a line for a test with its fixtures."""
        start, (own, children) = time.perf_counter(), spent()
        result = yield
        own_after, children_after = spent()
        line = {
            "test": item.nodeid,
            "seconds": time.perf_counter() - start,
            "own": own_after - own,
            "children": children_after - children,
        }
        with self.tests.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return result

    def pytest_sessionfinish(self) -> None:
        """Write what the process spent, if it ran tests."""
        if self.tests.exists():
            own, children = spent()
            self.kinds.write_text(json.dumps({**self.seconds, "own": own, "children": children}))
