"""Two tiers of tests: the gate, which every change passes, and all of them, which `make full` runs and records.

What the gate leaves out is marked where it stands, with the reason:

    @pytest.mark.full("reason")                                the test, or a case of it, is left out
    @pytest.mark.parametrize("case", share(CASES, gate, "reason"))   the gate has some of the cases
    @pairs("reason")                                           the gate has cases in which each two values meet
    @singles("reason")                                         the gate has each value of each argument
    @one("reason")                                             the gate has one of the cases
    @examples(gate=25, full=200, reason="...")                  the gate draws fewer examples
    @fewer(gate=2, full=20, reason="...")                       the fixture `rounds` is smaller in the gate

tests/FULL.md lists all of them and is written by `make full-list`.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest
from _pytest.mark import ParameterSet
from hypothesis import settings

TIERS = ("gate", "full")


def choose(tier: str) -> None:
    """Settle the tier of this process, before any test module is imported."""
    for each in TIERS:
        settings.register_profile(each, deadline=None)
    settings.load_profile(tier)


def chosen() -> str:
    """The tier of this process."""
    return settings.get_current_profile_name()


def share(values: Iterable[Any], gate: Collection[Any], reason: str) -> list[ParameterSet]:
    """Values to parametrise a test with, of which the gate has only those in `gate`.

    Values with an id are told apart by it, and those of several arguments are tuples.
    """
    cases = [value if isinstance(value, ParameterSet) else _parameter(value) for value in values]
    found = [_name(case) for case in cases]
    unknown = [name for name in gate if name not in found]
    assert not unknown, f"no such cases: {unknown}; expected some of {found}"
    marks = pytest.mark.full(reason)
    return [
        case if name in gate else case._replace(marks=[*case.marks, marks])
        for case, name in zip(cases, found, strict=True)
    ]


def _parameter(value: Any) -> ParameterSet:
    return pytest.param(*value) if isinstance(value, tuple) else pytest.param(value)


def _name(case: ParameterSet) -> Any:
    if case.id is not None:
        return case.id
    return case.values if len(case.values) > 1 else case.values[0]


def pairs(reason: str) -> pytest.MarkDecorator:
    """Of the cases of a test the gate has as many as it takes for each two values of two arguments to meet."""
    return pytest.mark.covered(reason, size=2)


def singles(reason: str) -> pytest.MarkDecorator:
    """Of the cases of a test the gate has as many as it takes for each value of each argument to be there."""
    return pytest.mark.covered(reason, size=1)


def one(reason: str) -> pytest.MarkDecorator:
    """Of the cases of a test the gate has one."""
    return pytest.mark.covered(reason, size=0)


def fewer(gate: int, full: int, reason: str) -> pytest.MarkDecorator:
    """Let the fixture `rounds` be `gate` in the gate and `full` otherwise."""
    return pytest.mark.fewer(reason, gate=gate, full=full)


def examples(gate: int, full: int, reason: str, **options: Any) -> Callable[[Any], Any]:
    """Hypothesis' settings with the number of examples of the tier; `options` are further settings."""
    count = {"gate": gate, "full": full}[chosen()]

    def decorate(test: Any) -> Any:
        return fewer(gate, full, reason)(settings(max_examples=count, deadline=None, **options)(test))

    return decorate
