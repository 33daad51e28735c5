"""Run transformers' own tests of LLaVA and Qwen2.5-VL over routed models that keep everything; record how each ends.

    python benchmarks/transformers_suite.py --tests transformers/tests

``transformers/tests`` is that folder of a checkout of transformers, near the installed version; it needs
`parameterized` and what else transformers' tests import. Nothing is downloaded. A test counts if it passes unrouted.
What is kept are names and outcomes, none of the tests' code.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer
from record import RESULTS, number_table, write
from rich.console import Console

FILES = {
    "LLaVA": "models/llava/test_modeling_llava.py",
    "Qwen2.5-VL": "models/qwen2_5_vl/test_modeling_qwen2_5_vl.py",
}
SCRIPTS = ("transformers_suite.py", "routed_suite.py")
OUTCOMES = ("pass", "nothing routed", "refusal", "failure")
DOCUMENTED = (
    "output_attentions",
    "assistant_model or prompt_lookup_num_tokens",
    "StaticCache",
    "cache_implementation",
    "several sequences packed into a row",
    "visual_mask",
    "without position_ids",
    "attention_mask",
    "no pixel_values were given",
    "expected one placeholder for each feature",
    "is on the meta device",
    "no_grad",
)
"""What refusals say that are among the limits in the README."""


def main(
    tests: Annotated[Path, typer.Option(help="The folder tests of a checkout of transformers.")],
    name: Annotated[str, typer.Option(help="Name of the JSON in benchmarks/results.")] = "transformers_suite",
    version: Annotated[str, typer.Option(help="Version of the checkout.")] = "",
) -> None:
    runs = {
        (file, is_routed): _start(tests.resolve(), file, is_routed)
        for file in FILES.values()
        for is_routed in (False, True)
    }
    unrouted, routed = (
        {node: how for file in FILES.values() for node, how in _finish(*runs[file, is_routed]).items()}
        for is_routed in (False, True)
    )
    results = {
        node: outcome(routed.get(node)) for node, how in unrouted.items() if how["outcome"] == "passed"
    }
    path = write(
        name,
        {
            "date": date.today().isoformat(),
            "tests_of": version,
            "scripts": script_hash(),
            "counts": counts(results),
            "tests": results,
        },
        RESULTS,
    )
    _show(results, path)


def script_hash() -> str:
    """Of the scripts that made a record."""
    here = Path(__file__).parent
    return hashlib.sha256(b"".join((here / script).read_bytes() for script in SCRIPTS)).hexdigest()


def outcome(how: Mapping[str, Any] | None) -> dict[str, str]:
    """How a test that passes unrouted ended over a routed model."""
    if how is None:
        return {"outcome": "failure", "error": "", "message": "the test did not run"}
    if how["outcome"] == "failed":
        kind = "refusal" if how["kind"] == "refusal" else "failure"
        return {"outcome": kind, "error": how["error"], "message": how["message"]}
    if how["outcome"] != "passed":
        return {"outcome": "failure", "error": "", "message": f"the test was {how['outcome']}"}
    return {"outcome": "pass" if how["routed_calls"] else "nothing routed"}


def counts(results: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, int]]:
    """How many tests of each family ended how."""
    found = {}
    for family, file in FILES.items():
        ended = Counter(how["outcome"] for node, how in results.items() if file in node)
        found[family] = {kind: ended[kind] for kind in OUTCOMES}
    return found


def _start(tests: Path, file: str, is_routed: bool) -> tuple["subprocess.Popen[bytes]", Path]:
    """A run of the tests in a file; what they print goes beside the JSON of their outcomes."""
    out = Path(tempfile.mkdtemp()) / "outcomes.json"
    here = str(Path(__file__).parent)
    variables = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH")))),
        "ROUTED_SUITE_OUT": str(out),
        "ROUTED_SUITE_ROUTE": str(int(is_routed)),
    }
    options = ["-q", "--tb=short", "-p", "routed_suite", "-p", "no:cacheprovider", "-o", "log_cli=0"]
    with out.with_suffix(".txt").open("wb") as printed:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, str(tests / file)],
            cwd=tests.parent,
            env=variables,
            stdout=printed,
            stderr=subprocess.STDOUT,
        )
    print(f"{file}, {'routed' if is_routed else 'unrouted'}: {out.with_suffix('.txt')}", flush=True)
    return process, out


def _finish(process: "subprocess.Popen[bytes]", out: Path) -> dict[str, dict[str, Any]]:
    process.wait()
    found: dict[str, dict[str, Any]] = json.loads(out.read_text())
    return found


def _show(results: Mapping[str, Mapping[str, str]], path: Path) -> None:
    table = number_table("tests of", *OUTCOMES)
    for family, ended in counts(results).items():
        table.add_row(family, *map(str, ended.values()))
    Console().print(table)
    for node, how in results.items():
        if how["outcome"] == "failure":
            print(node, how["error"], how["message"])
    print(path)


if __name__ == "__main__":
    typer.run(main)
