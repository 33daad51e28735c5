"""The record of the last run of all tests: made of a clean commit, and compared with the history."""

import json
import os
import platform
import subprocess
import time
from collections import Counter, defaultdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).with_name("full_record.json")
LIMIT = 40
"""Commits that may follow before all tests have to be run again."""
COMMAND = "make full, and commit tests/full_record.json"


class NotRecordable(Exception):
    """The run could not be told from that of another state of the code."""


class NoHistory(Exception):
    """Here can't be known how far back a commit lies."""


class Outdated(Exception):
    """All tests have to be run again."""


def git(folder: Path, *arguments: str) -> str:
    """What git says, without white space around it.

    Raises:
        NoHistory: there is no git, or it failed.
    """
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoHistory(f"git {' '.join(arguments)} failed in {folder}: {error}") from error
    return done.stdout.strip()


def clean_commit(folder: Path) -> str:
    """The commit that a checkout holds.

    Raises:
        NotRecordable: files were changed since, or there is no checkout.
    """
    try:
        changed, commit = git(folder, "status", "--porcelain"), git(folder, "rev-parse", "HEAD")
    except NoHistory as error:
        raise NotRecordable(f"no commit to record; expected a git checkout. {error}") from error
    if changed:
        raise NotRecordable(
            f"the checkout is not as it was committed:\n{changed}\nexpected no changes. Commit them first."
        )
    return commit


def commits_since(commit: str, folder: Path = ROOT) -> int:
    """Number of commits after `commit`.

    Raises:
        NoHistory: not a checkout, or a shallow one that doesn't hold the commit.
        Outdated: the commit is not part of the history of what is checked out.
    """
    if not (folder / ".git").exists():
        raise NoHistory(f"{folder} is no git checkout")
    try:
        git(folder, "merge-base", "--is-ancestor", commit, "HEAD")
    except NoHistory as error:
        if git(folder, "rev-parse", "--is-shallow-repository") == "false":
            raise Outdated(
                f"{commit} is not in the history of HEAD; expected an ancestor. Run {COMMAND}"
            ) from error
        known = int(git(folder, "rev-list", "--count", "HEAD"))
        if known > LIMIT:
            return known
        raise NoHistory(f"a shallow clone with {known} commits, none of which is {commit}") from error
    return int(git(folder, "rev-list", "--count", f"{commit}..HEAD"))


def check_recent(commit: str, folder: Path = ROOT) -> None:
    """Raise `Outdated` if more than 40 commits came after `commit`, or `NoHistory` if that can't be known."""
    count = commits_since(commit, folder)
    if count > LIMIT:
        raise Outdated(f"all tests ran {count} commits ago; expected at most {LIMIT}. Run {COMMAND}")


def seconds_by_file() -> dict[str, float]:
    """How long each test file took when all tests were run last."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"files": {}}
    return {name: counts["seconds"] for name, counts in record["files"].items()}


class Recorder:
    """Counts the results of a run and writes them down if all passed."""

    def __init__(self) -> None:
        self.commit = clean_commit(ROOT)
        self.start = time.perf_counter()
        self.files: dict[str, Counter[str]] = defaultdict(Counter)
        self.reasons: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called for setting up, running and tearing down each test."""
        counts = self.files[report.nodeid.partition("::")[0]]
        counts["seconds"] += report.duration
        if report.when == "call" or report.outcome == "skipped":
            counts[report.outcome] += 1
        if report.outcome == "skipped":
            self.reasons[
                report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            ] += 1

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Write the record if everything passed and the checkout still is that commit."""
        if exitstatus != pytest.ExitCode.OK or clean_commit(ROOT) != self.commit:
            print(f"\n{RECORD.name} is not written: tests failed, or the checkout changed meanwhile.")
            return
        RECORD.write_text(json.dumps(self.record(), indent=1) + "\n")
        print(f"\n{RECORD.name} is written; commit it.")

    def record(self) -> dict[str, Any]:
        """What is written."""
        names = ("torch", "transformers", "triton", "pytest", "hypothesis")
        outcomes = {
            outcome: sum(counts[outcome] for counts in self.files.values())
            for outcome in ("passed", "skipped", "failed")
        }
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": self.commit,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
            "cores": os.cpu_count(),
            **outcomes,
            "skipped_because": dict(sorted(self.reasons.items())),
            "seconds": round(time.perf_counter() - self.start),
            "files": {
                name: {**counts, "seconds": round(counts["seconds"], 1)}
                for name, counts in sorted(self.files.items())
            },
        }
