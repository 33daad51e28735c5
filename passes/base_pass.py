"""What a pass is: it takes a decoder graph and returns it with a typed result."""

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, final

from .base_errors import MatchError
from .model_graph import ModelGraph


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

    The base class owns what every pass needs: order, timing, dumps before and after, dead-code
    elimination, lint.

    Attributes:
        requires: facts about the graph that passes before this one have to provide.
        provides: facts that hold after it.
        excludes: facts that must not hold before it: what they name would be lost or done twice.
    """

    requires: ClassVar[tuple[str, ...]] = ()
    provides: ClassVar[tuple[str, ...]] = ()
    excludes: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        return type(self).__name__

    @abstractmethod
    def apply(self, graph: ModelGraph) -> PassResult:
        """Edit `graph` in place and say what was done; `seconds` is filled in by the caller."""

    @final
    def __call__(self, graph: ModelGraph, dump: Path | None = None) -> tuple[ModelGraph, PassResult]:
        """Run the pass.

        Args:
            graph: edited in place.
            dump: path prefix; the graph is written to ``<dump>.before.txt`` and ``.after.txt``.

        Raises:
            MatchError: the graph does not have the form that the pass needs, or passes are in the wrong order.
        """
        start = time.perf_counter()
        self._check_order(graph)
        if dump:
            dump.with_suffix(".before.txt").write_text(graph.to_text())
        result = self.apply(graph)
        graph.facts |= frozenset(self.provides)
        graph.clean_up()
        if dump:
            dump.with_suffix(".after.txt").write_text(graph.to_text())
        return graph, replace(result, name=self.name, seconds=time.perf_counter() - start)

    def _check_order(self, graph: ModelGraph) -> None:
        for fact in self.requires:
            if fact not in graph.facts:
                raise MatchError(
                    f"{self.name} requires {fact}, which no pass before it provides; expected {_providers(fact)} to "
                    f"run first."
                )
        for fact in self.excludes:
            if fact in graph.facts:
                raise MatchError(
                    f"{self.name} can't run on a graph with {fact}, which {_providers(fact)} provides; expected it to "
                    f"run before that, and once."
                )


def _providers(fact: str) -> str:
    names = (step.__name__ for step in Pass.__subclasses__() if fact in step.provides)
    return " or ".join(sorted(set(names)))


def refuse(what: str, expected: str, rejected: tuple[Rejection, ...]) -> MatchError:
    """A `MatchError` that names what was found, what was expected and the nearest miss."""
    lines = [f"{what}; expected {expected}."]
    lines += [f"Nearest miss: %{miss.node}: {miss.reason}." for miss in rejected[:3]]
    if len(rejected) > 3:
        lines.append(f"{len(rejected) - 3} more were rejected.")
    return MatchError(" ".join(lines))
