"""What trials lost, measured in processes side by side and kept in a file.

A search asks for the same measurements in the same order whenever it starts with the same seed. So a file of what was
measured is all that it takes to go on where one was cut short, and to come to the same result.
"""

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from ..common.json_files import check_file
from ..common.turns import TURN
from ..config.routing_config import RoutingConfig
from ..errors import ConfigError
from .divergence import Answered, Losses, Router

Job = tuple[RoutingConfig, int]
"""A configuration, and the number of the part of the prompts on which it is tried."""


class MeasuredLosses:
    """Measures jobs, each once.

    Args:
        router: of the model.
        parts: the prompts, in parts.
        facts: of what the measurements depend on, as they stand in the file.
        log: file to read and to append to; None to keep nothing.
        workers: processes. They are forked, so that weights and prompts are in memory once, and run on one thread each;
            1 measures in this process.

    Raises:
        ConfigError: the file is no such log, or of another model or of other prompts.
        InputError: it can't be made.
    """

    def __init__(
        self,
        router: Router,
        parts: Sequence[Sequence[Answered]],
        facts: Mapping[str, Any],
        log: Path | None = None,
        workers: int = 1,
    ) -> None:
        self._router, self._parts, self._log = router, parts, log
        self._known = _read_log(log, facts) if log else {}
        self._pools = _fork(workers, router, parts) if workers > 1 else []
        self._places: dict[RoutingConfig, int] = {}

    def __call__(self, jobs: Sequence[Job]) -> list[Losses]:
        """The losses of each job, in order."""
        running: dict[str, Future[Losses]] = {}
        for job in jobs:
            if self._pools and (name := _name(job)) not in self._known and name not in running:
                running[name] = self._submit(job)
        return [self._wait(job, running) for job in jobs]

    def _submit(self, job: Job) -> Future[Losses]:
        # Whoever tried a configuration before has its program.
        place = self._places.setdefault(job[0], len(self._places) % len(self._pools))
        return self._pools[place].submit(_run, *job)

    def _wait(self, job: Job, running: Mapping[str, "Future[Losses]"]) -> Losses:
        name = _name(job)
        if name not in self._known:
            config, part = job
            losses = (
                running[name].result() if name in running else self._router.losses(config, self._parts[part])
            )
            self._known[name] = losses
            if self._log:
                with self._log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"job": name, **vars(losses)}) + "\n")
        return self._known[name]

    def close(self) -> None:
        """End the processes, without waiting for what they measure."""
        for pool in self._pools:
            processes = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()


def _name(job: Job) -> str:
    config, part = job
    return json.dumps([config.to_dict(), part], sort_keys=True)


def _read_log(path: Path, facts: Mapping[str, Any]) -> dict[str, Losses]:
    """What was measured before; starts the file if there is none."""
    check_file(path)
    expected = json.loads(json.dumps(facts))
    if not path.exists():
        path.write_text(json.dumps(expected) + "\n", encoding="utf-8")
    header, *lines = path.read_text(encoding="utf-8").split("\n")
    try:
        found = json.loads(header)
        differ = [name for name in expected if found[name] != expected[name]]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"log is {str(path)!r}, which holds something else; expected a file that tuning wrote, or a free name."
        ) from error
    if differ:
        raise ConfigError(
            f"log is {str(path)!r}, which was written with another {differ[0]}: {found[differ[0]]}; expected "
            f"{expected[differ[0]]}. Use another file."
        )
    known = {}
    # Behind the last line break is nothing, or what a killed process left half written.
    for line in lines[:-1]:
        given = json.loads(line)
        known[given["job"]] = Losses(*(tuple(given[each.name]) for each in fields(Losses)))
    if lines[-1:] != [""]:
        path.write_text("\n".join([header, *lines[:-1], ""]), encoding="utf-8")
    return known


def default_workers(device: torch.device, most: int) -> int:
    """As many as there are cores, up to `most`; 1 on a GPU, and off Linux, where forked libraries may hang."""
    if device.type != "cpu" or sys.platform != "linux":
        return 1
    return min(most, len(os.sched_getaffinity(0)))


_mine: tuple[Router, Sequence[Sequence[Answered]]] | None = None
"""In a forked process what it measures with."""


def _fork(count: int, router: Router, parts: Sequence[Sequence[Answered]]) -> list[ProcessPoolExecutor]:
    pools = [
        ProcessPoolExecutor(1, get_context("fork"), initializer=_start, initargs=(router, parts))
        for _ in range(count)
    ]
    # A lock that another thread holds while this one forks would never be free in the new process.
    with TURN:
        for started in [pool.submit(int) for pool in pools]:
            started.result()
    return pools


def _start(router: Router, parts: Sequence[Sequence[Answered]]) -> None:
    global _mine
    _mine = router, parts
    torch.set_num_threads(1)
    # An interrupt is the parent's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run(config: RoutingConfig, part: int) -> Losses:
    assert _mine is not None
    router, parts = _mine
    return router.losses(config, parts[part])
