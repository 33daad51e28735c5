"""The gate: phases side by side where they need nothing of each other. Usage: .ci/gate.py [--record FILE].

Each phase's output is printed when it ends, with its seconds. Ends with an error if any phase failed.
"""

import argparse
import json
import subprocess
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOGS = ROOT / "build" / "gate"


@dataclass(frozen=True)
class Phase:
    """A shell command that passes or fails."""

    name: str
    command: str


@dataclass(frozen=True)
class Ended:
    """What became of a phase."""

    name: str
    returncode: int
    seconds: float

    def __str__(self) -> str:
        how = "passed" if self.returncode == 0 else f"FAILED with {self.returncode}"
        return f"{self.name:12} {how:16} {self.seconds:7.1f} s"


# The page of the pictures is opened in a browser.
BROWSER = """command -v chromium || {
  apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } > /dev/null"""
# The vectors in the repository are those that were handed down, where those are.
GOLDEN = """if [ -d "${GIVEN_VECTORS:-}" ]; then
  for model in llava qwen2_5_vl nuwa; do diff -r "$GIVEN_VECTORS/$model" tests/golden/$model; done
fi"""

SETUP = ([Phase("setup", "make .venv/.installed")], [Phase("browser", BROWSER)])
"""What the others need. Lanes run side by side, the phases of a lane one after another."""

CHECKS = (
    [Phase("tests", "make test")],
    [
        Phase("lint", "make lint"),
        Phase("golden", GOLDEN),
        Phase("types", "make types"),
        Phase("docs", "make docs"),
        Phase("wheel", "make wheel-check"),
        Phase("command", ".venv/bin/reroute-fx paper configs > /dev/null"),
    ],
)
"""Two lanes, and two processes in that of the tests: three processes keep two cores busy."""

PRINTING = threading.Lock()


def run(phase: Phase) -> Ended:
    """Run a phase and print what it said."""
    log, start = LOGS / f"{phase.name}.log", time.perf_counter()
    with log.open("w") as file:
        command = ["bash", "-euo", "pipefail", "-c", phase.command]
        done = subprocess.run(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
    ended = Ended(phase.name, done.returncode, time.perf_counter() - start)
    with PRINTING:
        print(f"\n===== {ended}", log.read_text(errors="replace"), sep="\n", flush=True)
    return ended


def run_lane(phases: Sequence[Phase]) -> list[Ended]:
    return [run(phase) for phase in phases]


def run_lanes(lanes: Sequence[Sequence[Phase]]) -> list[Ended]:
    with ThreadPoolExecutor(len(lanes)) as pool:
        return [ended for lane in pool.map(run_lane, lanes) for ended in lane]


def main() -> None:
    """Run all phases; without a good environment none but those that make it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, help="write seconds of the phases as JSON")
    given = parser.parse_args()
    LOGS.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    phases = run_lanes(SETUP)
    if all(phase.returncode == 0 for phase in phases):
        phases += run_lanes(CHECKS)
    total = time.perf_counter() - start
    failed = [phase.name for phase in phases if phase.returncode]
    print("\n=====", *phases, f"{'gate':12} {'FAILED' if failed else 'passed':16} {total:7.1f} s", sep="\n")
    if given.record:
        record = {
            "seconds": {phase.name: round(phase.seconds, 1) for phase in phases},
            "total": round(total, 1),
        }
        given.record.write_text(json.dumps({**record, "failed": failed}) + "\n")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
