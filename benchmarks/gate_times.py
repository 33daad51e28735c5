"""Seconds of the gate by phase, and where the processor seconds of its tests go, on a fresh clone of this commit.

python benchmarks/gate_times.py ENTRY [--note TEXT]

Writes the entry, such as before or after, of results/gate.json. Nothing else should run meanwhile.
"""

import argparse
import json
import os
import subprocess
import tempfile
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from reroute_fx.benchmarking.machine import environment
from reroute_fx.common.json_files import write_json

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).parent / "results" / "gate.json"
SLOWEST = 40


def measure(folder: Path) -> dict[str, Any]:
    """Run the gate on a clone in `folder`."""
    clone, seconds = folder / "clone", folder / "seconds"
    subprocess.run(["git", "clone", "--quiet", "--no-local", ROOT, clone], check=True)
    variables = {**os.environ, "PYTEST_ADDOPTS": f"--processor-seconds={seconds}"}
    for name in ("VIRTUAL_ENV", "PYTHONPATH"):
        variables.pop(name, None)
    command = ["bash", ".ci/run", "--record", folder / "phases.json"]
    done = subprocess.run(command, cwd=clone, env=variables, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise SystemExit(f"the gate failed with {done.returncode}; expected 0. See what it said above.")
    phases = json.loads((folder / "phases.json").read_text())
    return {"phases": phases["seconds"], "total": phases["total"], "tests": tests(seconds)}


def tests(folder: Path) -> dict[str, Any]:
    """What `--processor-seconds` wrote, in sums."""
    lines = [json.loads(line) for path in folder.glob("tests-*.jsonl") for line in path.open()]
    kinds: Counter[str] = Counter()
    for path in folder.glob("kinds-*.json"):
        kinds.update(json.loads(path.read_text()))
    total = kinds.pop("own") + kinds.pop("children")
    files: Counter[str] = Counter()
    for line in lines:
        files[line["test"].partition("::")[0]] += line["own"] + line["children"]
    slowest = sorted(lines, key=lambda line: line["own"] + line["children"], reverse=True)[:SLOWEST]
    return {
        "count": len(lines),
        "processor_seconds": rounded(total),
        "by_kind": {name: rounded(value) for name, value in kinds.most_common()}
        | {"rest": rounded(total - kinds.total())},
        "by_file": {name: rounded(value) for name, value in files.most_common()},
        "slowest": [{name: rounded(value) for name, value in line.items()} for line in slowest],
    }


def rounded(value: Any) -> Any:
    return round(value, 1) if isinstance(value, float) else value


def main() -> None:
    """Measure and write an entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("entry", help="its name in the record")
    parser.add_argument("--note", help="what a reader has to know about this measurement")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder))
    facts = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "note": given.note}
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    record[given.entry] = {**facts, "environment": environment(torch.device("cpu")), **measured}
    write_json(RECORD, record)


if __name__ == "__main__":
    main()
