"""What a compiler is given for the operators on CUDA: launches that it sees, no opaque calls, no copies."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCHES = {
    "visual_scores": [["logits", "maxima", "sums"], ["scores"]],
    "select_tokens": [["kept"], ["positions"]],
    "compact_tokens": [["result_0", "result_1", "result_2"]],
    "restore_tokens": [["stream"]],
}
"""Of each operator its launches, and what each of them writes."""


@pytest.fixture(scope="module")
def traced():
    script = Path(__file__).with_name("trace_for_cuda.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.full("22 s; it guards a measurement on a GPU, no product code")
@pytest.mark.parametrize("name", LAUNCHES)
def test_every_launch_is_seen(traced, name):
    operators = traced[name]["kernels"]["operators"]
    assert operators["triton_kernel_wrapper_functional"] == len(LAUNCHES[name])
    assert not any(operator.startswith("reroute.") for operator in operators)
    assert traced[name]["opaque"]["operators"][f"reroute.{name}"] == 1


@pytest.mark.full("10 s; it guards a measurement on a GPU, no product code")
@pytest.mark.parametrize("name", LAUNCHES)
def test_launches_write_what_the_operator_makes_and_nothing_else(traced, name):
    assert traced[name]["kernels"]["written"] == LAUNCHES[name]


@pytest.mark.parametrize("name", LAUNCHES)
def test_nothing_is_copied(traced, name):
    """But the stream, where it may not be written in place."""
    copies = {"aten.clone", "aten.contiguous", "aten._to_copy", "aten.copy", "aten.copy_"}
    found = copies & traced[name]["kernels"]["operators"].keys()
    assert found == ({"aten.clone"} if name == "restore_tokens" else set())


@pytest.mark.parametrize("name", LAUNCHES)
def test_results_have_the_symbolic_sizes_that_the_operator_declares(traced, name):
    results = traced[name]["kernels"]["results"]
    assert results == traced[name]["opaque"]["results"]
    assert all(size.startswith(("s", "(s")) for result in results for size in result[: len(result) // 2])
