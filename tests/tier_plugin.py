"""What pytest does about tiers: choose, order, list, and record the run of all tests."""

import json
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import full_record
import pytest
import suite_tiers
from xdist.scheduler import LoadFileScheduling

LIST = Path(__file__).with_name("FULL.md")
MEASURED = Path(__file__).parents[1] / "benchmarks" / "results" / "gate.json"
FOUND = pytest.StashKey[str | None]()
"""What FULL.md has to hold; None if only a part of the suite was collected."""

TOGETHER = {
    "golden": (
        "test_golden",
        "test_export_again",
        "test_lowering",
        "test_official",
        "test_number_stages",
    ),
    "artifacts": ("test_artifact", "test_run_artifacts", "test_faulty_artifacts"),
}
"""Files that share what is expensive: captured golden models, artifacts. Two processes would make it twice or wait."""

HEAD = """# What the gate leaves out

`make full` runs it, and everything else. Written by `make full-list` from the marks in the tests; a test compares.
Besides, the demo of the installed wheel runs in eager mode in the gate, and compiled in `make full`.

| test | in the gate | why |
|---|---|---|
"""


def add_options(parser: pytest.Parser) -> None:
    """`--tier`, and what the Makefile asks for."""
    group = parser.getgroup("tiers")
    group.addoption(
        "--tier", choices=suite_tiers.TIERS, default="gate", help="full: what the gate leaves out, too"
    )
    group.addoption("--write-full-list", action="store_true", help="write tests/FULL.md")
    group.addoption(
        "--record-full",
        action="store_true",
        help="write tests/full_record.json if all tests of a commit pass",
    )


def configure(config: pytest.Config) -> None:
    """Settle the tier, and get ready to record."""
    suite_tiers.choose(config.getoption("tier"))
    if config.getoption("record_full") and not is_worker(config):
        if config.getoption("tier") != "full" or not is_whole(config):
            raise pytest.UsageError(
                "--record-full records the whole suite; expected --tier full and no choice of tests"
            )
        try:
            config.pluginmanager.register(full_record.Recorder())
        except full_record.NotRecordable as error:
            raise pytest.UsageError(str(error)) from None


def is_worker(config: pytest.Config) -> bool:
    """Whether this process only runs what pytest-xdist hands to it."""
    return hasattr(config, "workerinput")


def is_whole(config: pytest.Config) -> bool:
    """Whether all tests were asked for."""
    places = {(config.invocation_params.dir / argument).resolve() for argument in config.args}
    chosen = config.getoption("keyword") or config.getoption("markexpr")
    return not chosen and places == {config.rootpath / name for name in config.getini("testpaths")}


def modify_items(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long groups first, so that no processor waits for the last one; the gate's share, if that is the tier."""
    sort_by_seconds(items, known_seconds(config.getoption("tier")))
    tests = by_test(items)
    for cases in tests.values():
        mark_covered(cases)
    config.stash[FOUND] = HEAD + "".join(rows(tests)) if is_whole(config) else None
    if config.getoption("write_full_list"):
        if not is_whole(config):
            raise pytest.UsageError("--write-full-list lists the whole suite; expected no choice of tests")
        LIST.write_text(config.stash[FOUND])
    if config.getoption("tier") == "gate":
        left_out = [item for item in items if item.get_closest_marker("full")]
        items[:] = [item for item in items if not item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)


def sort_by_seconds(items: list[pytest.Item], seconds: dict[str, float]) -> None:
    """Sort by what their groups take, which run in one process each."""
    total = Counter()
    for name in {file_of(item) for item in items}:
        total[group_of(name)] += seconds.get(name, 0.0)
    items.sort(key=lambda item: -total[group_of(file_of(item))])


def group_of(name: str) -> str:
    """Of a test file: those of a group run in one process, one after another."""
    return next((group for group, names in TOGETHER.items() if Path(name).stem in names), name)


def known_seconds(tier: str) -> dict[str, float]:
    """How long each file took when it was measured last: in the gate by benchmarks/gate_times.py, or in `make full`."""
    if tier == "full":
        return full_record.seconds_by_file()
    entries = list(json.loads(MEASURED.read_text()).values()) if MEASURED.exists() else []
    return entries[-1]["tests"]["by_file"] if entries else {}


class Scheduling(LoadFileScheduling):
    """Hands out files, or groups of them."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(super()._split_scope(nodeid))


def file_of(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


def by_test(items: list[pytest.Item]) -> dict[str, list[pytest.Item]]:
    """The cases of each test."""
    found = defaultdict(list)
    for item in items:
        found[item.nodeid.partition("[")[0]].append(item)
    return found


def mark_covered(cases: list[pytest.Item]) -> None:
    """Mark the cases of a test that its other cases cover, if the test is marked so."""
    mark = cases[0].get_closest_marker("covered")
    if mark is None:
        return
    cases = [case for case in cases if not case.get_closest_marker("full")]
    size = mark.kwargs["size"]
    # Values need not be hashable; those of the cases of a test are the same objects.
    values = {case: [(name, id(value)) for name, value in case.callspec.params.items()] for case in cases}
    covers = {case: set(combinations(sorted(values[case]), size)) for case in cases}
    missing = set().union(*covers.values())
    left_out = list(cases)
    while missing:
        best = max(left_out, key=lambda case: len(covers[case] & missing))
        missing -= covers[best]
        left_out.remove(best)
    for case in left_out:
        case.add_marker(pytest.mark.full(mark.args[0]))


def rows(tests: dict[str, list[pytest.Item]]) -> list[str]:
    """Lines of the list, one for each test of which the gate has less."""
    return [line for test in sorted(tests) for line in row(test, tests[test])]


def row(test: str, cases: list[pytest.Item]) -> list[str]:
    """The line of a test, if the gate has less of it."""
    left_out = [case for case in cases if case.get_closest_marker("full")]
    reasons = [mark.args[0] for case in left_out for mark in case.iter_markers("full")]
    shares = [f"{len(cases) - len(left_out)} of {len(cases)}"] if left_out else []
    for mark in cases[0].iter_markers("fewer"):
        shares.append("{gate} of {full} rounds".format(**mark.kwargs))
        reasons.append(mark.args[0])
    return [f"| `{test}` | {', '.join(shares)} | {'; '.join(dict.fromkeys(reasons))} |\n"] if shares else []


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    """How often a test marked as `fewer` does what it does."""
    mark = request.node.get_closest_marker("fewer")
    return mark.kwargs[suite_tiers.chosen()]
