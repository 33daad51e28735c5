"""The drop-in tests at the corners of the declared version ranges, each in an environment of its own.

python benchmarks/version_corners.py [--folder build/corners] [TEST ...]

Environments stay in the folder and are used again; the package is installed anew as a wheel. Records what passed and
failed, with versions and date, in results/version_corners.json, and ends with an error if anything failed.
"""

import argparse
import json
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).parent / "results" / "version_corners.json"
CORNERS = (("2.11.0", "5.19.0"), ("2.13.0", "5.23.0"))
"""torch and transformers: the oldest and the newest that the package was made for."""
TESTS = (
    "tests/test_routed_model.py",
    "tests/test_generation.py",
    "tests/test_cache.py",
    "tests/test_golden.py",
)
TOOLS = ("pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "jsonschema>=4", "packaging")
# What Inductor makes of the vectors is the gate's to test: compiling takes hours here.
EAGER = "not inductor"


def run(*command: str | Path) -> None:
    subprocess.run(list(map(str, command)), check=True, cwd=ROOT)


def prepare(folder: Path, torch: str, transformers: str) -> Path:
    """The environment of a corner with the checkout's wheel in it."""
    if not (folder / "bin" / "python").exists():
        run(sys.executable, "-m", "venv", folder)
    pip = (folder / "bin" / "python", "-m", "pip", "install", "--quiet")
    pinned = (f"torch=={torch}", f"transformers=={transformers}")
    run(*pip, pinned[0])
    run(*pip, *pinned, *TOOLS, ROOT)
    run(*pip, "--force-reinstall", "--no-deps", ROOT)
    return folder


def test(folder: Path, tests: list[str]) -> dict[str, Any]:
    """Counts, and the names of what failed."""
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    start = time.perf_counter()
    options = ("-q", "-k", EAGER, f"--junitxml={report}")
    # Not as a module: the checkout's folder of the same name would be imported instead of the wheel.
    subprocess.run([folder / "bin" / "pytest", *options, *tests], cwd=ROOT, check=False)
    if not report.exists():
        raise SystemExit(f"pytest did not run in {folder}; expected a report. See what it said above.")
    cases = list(xml.parse(report).getroot().iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - len(failed) - skipped,
        "skipped": skipped,
        "failed": len(failed),
        "failures": [f"{case.get('classname')}::{case.get('name')}" for case in failed],
        "seconds": round(time.perf_counter() - start),
    }


PRINT_VERSIONS = """
import json, platform
from importlib.metadata import version
names = ("torch", "transformers", "reroute-fx")
print(json.dumps({"python": platform.python_version(), **{name: version(name) for name in names}}))
"""


def versions(folder: Path) -> dict[str, str]:
    """What is installed, by name."""
    command = [folder / "bin" / "python", "-c", PRINT_VERSIONS]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tests", nargs="*", default=list(TESTS), help="files or names of tests")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "corners", help="for environments")
    given = parser.parse_args()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    corners = []
    for torch, transformers in CORNERS:
        folder = prepare(
            given.folder.absolute() / f"torch-{torch}-transformers-{transformers}", torch, transformers
        )
        corners.append(
            {**versions(folder), "date": datetime.now(UTC).isoformat(), **test(folder, given.tests)}
        )
        record = {
            "commit": commit.stdout.strip(),
            "tests": given.tests,
            "left_out": "inductor",
            "corners": corners,
        }
        RECORD.write_text(json.dumps(record, indent=2) + "\n")
    if any(corner["failed"] for corner in corners):
        raise SystemExit(f"Tests failed at a corner; {RECORD} names them.")


if __name__ == "__main__":
    main()
