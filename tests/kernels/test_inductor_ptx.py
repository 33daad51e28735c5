"""What Inductor makes of the regions of 7B decoders for an H100: 16-byte accesses, no local memory.

The regions are those that the product hands it, with the sizes that it hands on: widths are numbers, rows are symbols.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ptx_text import accesses

pytestmark = pytest.mark.full("40 s of a processor; it guards a measurement on a GPU")

DECODERS = ("llava-1.5-7b", "qwen2-7b")
REGIONS = ("prompt: layer", "prompt: decision", "following: layer", "following: masks and angles")
MANY = 2**20
"""Elements from which a kernel's accesses matter. Below are those of the last token of each row."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """For each region its kernels, and for each of those the configurations among which Inductor chooses."""
    script = Path(__file__).with_name("inductor_for_cuda.py")
    result = tmp_path_factory.mktemp("ptx") / "made.json"
    done = subprocess.run([sys.executable, script, result], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(result.read_text())


def test_regions_of_all_kinds_are_compiled(made):
    wanted = {f"{decoder}, {region}" for decoder in DECODERS for region in REGIONS}
    assert wanted <= made.keys()
    assert all(kernel["codes"] for kernels in made.values() for kernel in kernels)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("region", "least"), [("prompt: layer", 5), ("prompt: decision", 2), ("following: layer", 5)]
)
def test_many_numbers_are_moved_16_bytes_at_a_time(made, decoder, region, least):
    """In the first of the configurations; indices are read besides."""
    kernels = [
        k for k in made[f"{decoder}, {region}"] if "*bf16" in k["types"] and (k["elements"] or 0) >= MANY
    ]
    assert len(kernels) >= least
    for kernel in kernels:
        ptx = kernel["codes"][0]["ptx"]
        assert accesses(ptx, "st").keys() == {"v4.b32"}, kernel["name"]
        assert accesses(ptx, "ld").keys() - {"b64"} == {"v4.b32"}, kernel["name"]


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_project_s_own_kernels_too(made, decoder):
    """Of which a compiler knows the widths as well, the rows of the stream 8 KiB of them at once."""
    kernels = made[f"{decoder}, prompt: decision"]
    copies = [k for k in kernels if k["name"].startswith("_copy_rows") and k["constants"]["BLOCK"] == 4096]
    assert len(copies) == 2  # the last token of each row, and the stage
    for copy in copies:
        ptx = copy["codes"][0]["ptx"]
        assert accesses(ptx, "st").keys() == {"v4.b32"}
        assert accesses(ptx, "ld").keys() == {"v4.b32", "b64"}
    (scores,) = (k for k in kernels if k["name"].startswith("_split_logits"))
    assert accesses(scores["codes"][0]["ptx"], "ld")["v4.b32"] == 64 * 128 * 2 // (16 * 128)


def test_nothing_lies_in_local_memory(made):
    """But what CUDA's sine and cosine reduce large angles with."""
    for region, kernels in made.items():
        for kernel in kernels:
            for code in kernel["codes"]:
                is_local = ".local" in code["ptx"] or not re.search(r"STACK:0 .*LOCAL:0", code["resources"])
                is_angle = region.endswith("angles") and "_sin" in kernel["name"]
                assert is_local == is_angle, (region, kernel["name"], code["resources"])


def test_a_width_that_16_bytes_do_not_divide_would_show(made):
    for width, narrow in ((4096, False), (4099, True)):
        (kernel,) = made[f"sum of width {width}"]
        (written,) = accesses(kernel["codes"][0]["ptx"], "st")
        assert (written == "b16") == narrow
