"""What a pass is: it takes a decoder graph and returns it with a typed result."""

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from .decoder_graph import DecoderGraph
from .errors import MatchError


@dataclass(frozen=True)
class Rejection:
    """A place that looked like a match and was left alone, and why."""

    node: str
    reason: str


@dataclass(frozen=True)
class PassResult:
    """What one run of a pass did.

    Attributes:
        name: class name of the pass.
        matched: places where the pattern was found.
        rewritten: places that were changed.
        rejected: places that came near, with reasons.
        detail: one line for people.
        seconds: wall-clock time, clean-up and checks included.
    """

    name: str
    matched: int = 0
    rewritten: int = 0
    rejected: tuple[Rejection, ...] = ()
    detail: str = ""
    seconds: float = 0.0


class Pass(ABC):
    """One rewriting step. A subclass writes `apply`; calling the pass runs it.

    The base class owns what every pass needs: timing, dumps before and after, dead-code
    elimination, lint.
    """

    @property
    def name(self) -> str:
        return type(self).__name__

    @abstractmethod
    def apply(self, graph: DecoderGraph) -> PassResult:
        """Edit `graph` in place and say what was done; `seconds` is filled in by the caller."""

    @final
    def __call__(self, graph: DecoderGraph, dump: Path | None = None) -> tuple[DecoderGraph, PassResult]:
        """Run the pass.

        Args:
            graph: edited in place.
            dump: path prefix; the graph is written to ``<dump>.before.txt`` and ``.after.txt``.

        Raises:
            MatchError: the graph does not have the form that the pass needs.
        """
        start = time.perf_counter()
        if dump:
            dump.with_suffix(".before.txt").write_text(graph.to_text())
        result = self.apply(graph)
        graph.clean_up()
        if dump:
            dump.with_suffix(".after.txt").write_text(graph.to_text())
        return graph, replace(result, name=self.name, seconds=time.perf_counter() - start)


def refuse(what: str, expected: str, rejected: tuple[Rejection, ...]) -> MatchError:
    """A `MatchError` that names what was found, what was expected and the nearest miss."""
    lines = [f"{what}; expected {expected}."]
    lines += [f"Nearest miss: %{miss.node}: {miss.reason}." for miss in rejected[:3]]
    if len(rejected) > 3:
        lines.append(f"{len(rejected) - 3} more were rejected.")
    return MatchError(" ".join(lines))
