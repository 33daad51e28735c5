"""Plant faults, one after another, and see whether the tests of the gate find them.

python benchmarks/planted_faults.py [PART...]

Works on a clone of the last commit, in an environment of its own. For each fault its files run in the gate's tier;
what failed is written to results/planted_faults.json. Ends with an error if a fault was not found. With names of parts
only their faults are tried, and the record keeps those of the others.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from record import RESULTS, write

ROOT = Path(__file__).parents[1]
RECORD = RESULTS / "planted_faults.json"


@dataclass(frozen=True)
class Fault:
    """A change of one place that makes some results wrong.

    Attributes:
        part: what is at fault.
        wrong: what goes wrong.
        file: where.
        before, after: the text, and what stands there instead.
        tests: files that run.
    """

    part: str
    wrong: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]


FAULTS = (
    Fault(
        "selection",
        "what is deleted in stages is ranked on the stream of the layer itself where the one before is asked",
        "passes/route_stages.py",
        "stream if decision.scoring_layer is layers[0] else before_last",
        "stream",
        ("tests/passes/test_route_stages.py", "tests/methods/test_official.py"),
    ),
    Fault(
        "restore",
        "rows are written over a stream that is read again",
        "passes/restore_in_place.py",
        "        if user > node:\n",
        "        if False:\n",
        ("tests/passes/test_restore_in_place.py", "tests/test_identities.py", "tests/test_golden.py"),
    ),
    Fault(
        "cache",
        "rows that are repeated for beams get the lengths of other rows",
        "reroute_fx/runtime/cache.py",
        "rows.repeat_interleave(repeats, dim=0)",
        "rows.repeat(repeats, *[1] * (rows.ndim - 1))",
        ("tests/test_cache.py", "tests/test_generation.py"),
    ),
    Fault(
        "capture",
        "a model with another config keeps the trace of the old one",
        "reroute_fx/capture/captured_decoder.py",
        "return self.config == config and self.structure == structure and self.parts.changed() is None",
        "return self.parts.changed() is None",
        ("tests/test_not_fresh.py", "tests/test_structure.py"),
    ),
    Fault(
        "masks",
        "of several masks by kind of layer only the first is looked at",
        "reroute_fx/runtime/masks.py",
        "    for mask, reaches in masks:\n        if mask.shape",
        "    for mask, reaches in masks[:1]:\n        if mask.shape",
        ("tests/test_other_attention.py",),
    ),
)


def main() -> None:
    """Try faults and write what found them."""
    record = json.loads(RECORD.read_text())["faults"] if len(sys.argv) > 1 else []
    known = {fault["part"]: fault for fault in record}
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder, "clone")
        run("git", "clone", "--quiet", "--no-local", str(ROOT), str(clone))
        run("make", ".venv/.installed", cwd=clone)
        for fault in FAULTS:
            if fault.part in sys.argv[1:] or not record:
                known[fault.part] = try_fault(fault, clone)
    found = [known[fault.part] for fault in FAULTS]
    write("planted_faults", {"faults": found})
    missed = [each["part"] for each in found if not each["found_by"]]
    if missed:
        raise SystemExit(f"not found: {', '.join(missed)}")


def try_fault(fault: Fault, clone: Path) -> dict[str, Any]:
    """Plant a fault in a clone, run its tests, and take it out again."""
    place = clone / fault.file
    text = place.read_text()
    assert text.count(fault.before) == 1, f"{fault.file} has another number of {fault.before!r} than one"
    place.write_text(text.replace(fault.before, fault.after))
    start = time.perf_counter()
    command = [".venv/bin/python", "-m", "pytest", "--numprocesses=auto", "--quiet", "--tb=no", *fault.tests]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=False)
    place.write_text(text)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    print(f"{fault.part}: found by {len(failed)} tests", *failed, sep="\n  ", flush=True)
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": run("git", "rev-parse", "HEAD", cwd=clone).stdout.strip(),
        "seconds": round(time.perf_counter() - start, 1),
    }
    return {**asdict(fault), **facts, "found_by": failed}


def run(*command: str, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)


if __name__ == "__main__":
    main()
