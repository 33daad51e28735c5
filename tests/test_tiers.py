"""What the gate leaves out is listed, and all tests were run lately."""

import json
import subprocess
from types import SimpleNamespace

import full_record
import pytest
import suite_tiers
import tier_plugin
from full_record import LIMIT, NoHistory, NotRecordable, Outdated, check_recent, clean_commit

pytest_plugins = ["pytester"]


def test_the_list_of_what_the_gate_leaves_out_is_current(pytestconfig):
    found = pytestconfig.stash[tier_plugin.FOUND]
    if found is None:
        pytest.skip("lists the whole suite, of which only a part was chosen")
    assert tier_plugin.LIST.read_text() == found, "run `make full-list`"


def test_all_tests_were_run_lately():
    if suite_tiers.chosen() == "full":
        pytest.skip("this is a run of all tests")
    assert full_record.RECORD.exists(), f"run {full_record.COMMAND}"
    record = json.loads(full_record.RECORD.read_text())
    assert record["failed"] == 0
    assert record["passed"] > 3000
    try:
        check_recent(record["commit"])
    except NoHistory as error:
        pytest.skip(f"how long ago all tests were run can't be known: {error}")


SUITE = """
import pytest
from hypothesis import given, strategies as st
from suite_tiers import examples, fewer, one, pairs, share, singles

@pytest.mark.full("takes an hour")
def test_long(): pass

@pytest.mark.parametrize("other", [1, 2])
@pytest.mark.parametrize("case", share("abc", gate="b", reason="all alike"))
def test_cases(case, other): pass

@pairs("a grid")
@pytest.mark.parametrize("third", "xy")
@pytest.mark.parametrize("second", "uv")
@pytest.mark.parametrize("first", "st")
def test_grid(first, second, third): pass

@pytest.mark.parametrize("case", share("abc", gate="bc", reason="all alike"))
@one("one is enough")
def test_one(case): pass

@singles("each once")
@pytest.mark.parametrize("second", "uv")
@pytest.mark.parametrize("first", "rst")
def test_values(first, second): pass

drawn = []

@examples(gate=3, full=9, reason="drawn at random")
@given(st.integers())
def test_drawn(number): drawn.append(number)

@fewer(gate=2, full=20, reason="slow")
def test_rounds(rounds): print(f"{len(drawn)} drawn, {rounds} rounds")
"""

CONFTEST = """
import sys
sys.path[:0] = {paths}
import tier_plugin
from pathlib import Path
import full_record
tier_plugin.LIST = Path(__file__).with_name("FULL.md")
full_record.ROOT, full_record.RECORD = Path(__file__).parent, Path(__file__).with_name("full_record.json")
rounds = tier_plugin.rounds
pytest_addoption = tier_plugin.add_options
pytest_configure = tier_plugin.configure
pytest_collection_modifyitems = tier_plugin.modify_items
"""


@pytest.fixture
def suite(pytester):
    """Some tests with all kinds of marks, run in a process of their own."""
    folder = str(tier_plugin.LIST.parent)
    markers = "markers = \n  full: \n  covered: \n  fewer: \n"
    pytester.makeini(f"[pytest]\n{markers}addopts = --strict-markers\ntestpaths = .\n")
    pytester.makeconftest(CONFTEST.format(paths=[folder]))
    pytester.makepyfile(test_some=SUITE)
    return pytester


def test_the_gate_leaves_out_what_is_marked(suite):
    result = suite.runpytest_subprocess("-s")
    result.assert_outcomes(passed=12, deselected=14)
    result.stdout.fnmatch_lines(["*3 drawn, 2 rounds*"])


def test_the_full_tier_has_everything(suite):
    result = suite.runpytest_subprocess("--tier", "full", "-s")
    result.assert_outcomes(passed=26)
    result.stdout.fnmatch_lines(["*9 drawn, 20 rounds*"])


def test_the_list_has_shares_and_reasons(suite):
    suite.runpytest_subprocess("--write-full-list", "--collect-only")
    assert (suite.path / "FULL.md").read_text() == tier_plugin.HEAD + (
        "| `test_some.py::test_cases` | 2 of 6 | all alike |\n"
        "| `test_some.py::test_drawn` | 3 of 9 rounds | drawn at random |\n"
        "| `test_some.py::test_grid` | 4 of 8 | a grid |\n"
        "| `test_some.py::test_long` | 0 of 1 | takes an hour |\n"
        "| `test_some.py::test_one` | 1 of 3 | all alike; one is enough |\n"
        "| `test_some.py::test_rounds` | 2 of 20 rounds | slow |\n"
        "| `test_some.py::test_values` | 3 of 6 | each once |\n"
    )


@suite_tiers.one("2 s each")
@pytest.mark.parametrize("options", [["--record-full"], ["--record-full", "--tier=full", "-k", "long"]])
def test_a_part_of_the_tests_is_not_recorded(suite, options):
    result = suite.runpytest_subprocess(*options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*records the whole suite; expected --tier full and no choice of tests*"])


@pytest.fixture
def committed(suite):
    """The same tests in a repository; a function that calls git in it."""

    def git(*arguments):
        command = ["git", "-c", "user.name=n", "-c", "user.email=e", *arguments]
        return subprocess.run(
            command, cwd=suite.path, capture_output=True, text=True, check=True
        ).stdout.strip()

    (suite.path / ".gitignore").write_text("__pycache__\n.*\nrunpytest-*\nstdout\nstderr\n")
    git("init")
    git("add", ".")
    git("commit", "--message", "c")
    suite.git = git
    return suite


RECORD_FULL = ("--record-full", "--tier=full", "-p", "no:cacheprovider")


def test_a_run_of_all_tests_is_recorded(committed):
    committed.runpytest_subprocess(*RECORD_FULL).assert_outcomes(passed=26)
    record = json.loads((committed.path / "full_record.json").read_text())
    assert record["commit"] == committed.git("rev-parse", "HEAD")
    assert (record["passed"], record["skipped"], record["failed"]) == (26, 0, 0)
    assert record["files"]["test_some.py"]["passed"] == 26
    assert record["files"]["test_some.py"]["seconds"] >= 0
    assert {"python", "torch", "transformers"} <= set(record["versions"])
    check_recent(record["commit"], committed.path)


def test_what_failed_or_was_not_committed_is_not_recorded(committed):
    (committed.path / "test_some.py").write_text("def test_fails(): assert False")
    refused = committed.runpytest_subprocess(*RECORD_FULL)
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(["*M test_some.py*", "*expected no changes. Commit them first.*"])
    committed.git("commit", "--all", "--message", "fails")
    failed = committed.runpytest_subprocess(*RECORD_FULL)
    failed.assert_outcomes(failed=1)
    failed.stdout.fnmatch_lines(["*full_record.json is not written*"])
    assert not (committed.path / "full_record.json").exists()


def test_cases_that_are_not_there_are_told():
    with pytest.raises(AssertionError, match="no such cases: \\['d'\\]"):
        suite_tiers.share("abc", gate="d", reason="all alike")


def test_long_groups_come_first_and_each_as_a_whole():
    names = ["tests/test_b.py", "tests/test_golden.py", "tests/test_c.py", "tests/test_lowering.py"]
    items = [SimpleNamespace(nodeid=f"{name}::test_{i}") for name in names for i in range(2)]
    seconds = {"tests/test_b.py": 5.0, "tests/test_golden.py": 4.0, "tests/test_lowering.py": 2.0}
    tier_plugin.sort_by_seconds(items, seconds)
    assert [tier_plugin.file_of(item) for item in items[::2]] == [names[1], names[3], names[0], names[2]]
    assert len({tier_plugin.group_of(tier_plugin.file_of(item)) for item in items[:4]}) == 1


def test_files_of_a_group_are_there():
    stems = {path.stem for path in tier_plugin.LIST.parent.rglob("test_*.py")}
    assert stems >= {name for names in tier_plugin.TOGETHER.values() for name in names}


@pytest.fixture
def repository(tmp_path):
    """A function that makes commits, and returns the last one, in a repository of its own."""

    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "init.defaultBranch=main"]
        done = subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def commit(count=1):
        for _ in range(count):
            git("commit", "--allow-empty", "--message", "c")
        return git("rev-parse", "HEAD")

    git("init")
    commit.git, commit.path = git, tmp_path
    return commit


def test_forty_commits_may_follow(repository):
    commit = repository()
    check_recent(commit, repository.path)
    repository(LIMIT)
    check_recent(commit, repository.path)
    repository()
    with pytest.raises(
        Outdated, match=f"ran {LIMIT + 1} commits ago; expected at most {LIMIT}. Run make full"
    ):
        check_recent(commit, repository.path)


def test_a_commit_of_another_history_is_refused(repository):
    first = repository()
    second = repository()
    repository.git("reset", "--hard", first)
    for commit in (second, "0" * 40):
        with pytest.raises(Outdated, match=f"{commit} is not in the history of HEAD"):
            check_recent(commit, repository.path)


def test_what_a_shallow_clone_does_not_tell_is_no_fault(repository, tmp_path):
    commit, _ = repository(), repository(LIMIT + 1)
    for depth, error, said in (
        (3, NoHistory, "a shallow clone with 3 commits"),
        (LIMIT + 1, Outdated, "ran"),
    ):
        folder = tmp_path / f"depth{depth}"
        repository.git("clone", "--depth", str(depth), f"file://{repository.path}", str(folder))
        with pytest.raises(error, match=said):
            check_recent(commit, folder)


def test_without_a_checkout_nothing_is_known(tmp_path):
    with pytest.raises(NoHistory, match="is no git checkout"):
        check_recent("0" * 40, tmp_path)
    with pytest.raises(NotRecordable, match="expected a git checkout"):
        clean_commit(tmp_path)


def test_only_what_is_committed_is_recorded(repository):
    commit = repository()
    assert clean_commit(repository.path) == commit
    (repository.path / "file").write_text("new")
    with pytest.raises(NotRecordable, match="file"):
        clean_commit(repository.path)
