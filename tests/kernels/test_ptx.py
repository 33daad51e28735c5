"""What Triton makes of the kernels for GPUs: 16-byte accesses, 64-bit addresses, no local memory."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ptx_text import accesses
from suite_tiers import share

CAPABILITIES = (80, 90, 100)
DTYPES = ("fp32", "fp16", "bf16")
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
THREADS = 128
"""Of a program: four warps, Triton's default."""


@functools.cache
def compiled(capability):
    script = Path(__file__).with_name("compile_to_ptx.py")
    done = subprocess.run(
        [sys.executable, script, str(capability)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(params=share(CAPABILITIES, [90], "20 s each"), ids="sm_{}".format)
def codes(request):
    """Code of all kernels for one GPU."""
    return compiled(request.param)


def test_all_kernels_are_compiled(codes):
    names = {name.split()[0] for name in codes}
    assert names == {"copy_rows", "write_rows", "split_logits", "mean_over_heads", "place", "rank"}
    assert all(".visible .entry" in code["ptx"] for code in codes.values())


@pytest.mark.parametrize("capability", share(CAPABILITIES, [90], "20 s each"))
def test_the_target_is_the_gpu_that_was_asked_for(capability):
    assert all(f".target sm_{capability}" in code["ptx"] for code in compiled(capability).values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "tensors"), [("copy_rows", 3), ("write_rows", 1)])
def test_rows_are_moved_16_bytes_at_a_time(codes, name, tensors, dtype):
    ptx = codes[f"{name} {dtype}"]["ptx"]
    moved = tensors * 4096 * BYTES[dtype] // (16 * THREADS)
    # One number more is read: the position.
    assert accesses(ptx, "ld") == {"v4.b32": moved, "b64": 1}
    assert accesses(ptx, "st") == {"v4.b32": moved}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["copy_rows", "write_rows"])
def test_odd_addresses_are_moved_element_by_element(codes, name, dtype):
    """Shows that the widths above are seen and not assumed."""
    ptx = codes[f"{name} {dtype} unaligned"]["ptx"]
    element = f"b{8 * BYTES[dtype]}"
    assert set(accesses(ptx, "st")) == {element}
    assert set(accesses(ptx, "ld")) == {element, "b64"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 7])
def test_keys_are_read_once_and_16_bytes_at_a_time(codes, group, dtype):
    read = accesses(codes[f"split_logits {dtype} {group}"]["ptx"], "ld")
    assert read["v4.b32"] == 64 * 128 * BYTES[dtype] // (16 * THREADS)
    # Then there are one load of each query head of the group, and of the row's length.
    assert sum(read.values()) == read["v4.b32"] + group + 1


def test_nothing_lies_in_local_memory(codes):
    for name, code in codes.items():
        assert ".local" not in code["ptx"], name
        used = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", code["resources"]))
        assert used["LOCAL"] == "0", name
        if "unaligned" not in name:
            assert used["STACK"] == "0", name


@pytest.mark.parametrize("name", ["copy_rows", "write_rows"])
def test_addresses_of_rows_are_products_of_64_bits(codes, name):
    for dtype in DTYPES:
        assert re.search(r"\bm(ul|ad)\.lo\.s64\b", codes[f"{name} {dtype}"]["ptx"])
