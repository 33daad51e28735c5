"""Compile all Triton kernels for a GPU that is not there; print their PTX and the resources they take as JSON.

Run in a process of its own: the tests interpret the kernels, which Triton settles as it is imported.
"""

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from reroute_fx.kernels.compact_tokens import triton as compact
from reroute_fx.kernels.restore_tokens import triton as restore
from reroute_fx.kernels.select_tokens import triton as select
from reroute_fx.kernels.visual_scores import triton as scores

WARP = 32


Code = dict[str, str]
"""``ptx``, and the ``resources`` of the machine code that the assembler made of it."""


def code(kernel: Any, types: dict[str, str], capability: int, aligned: bool = True, **constants: Any) -> Code:
    """Code of a kernel whose arguments have `types`, ``*`` for pointers, or are `constants`.

    Pointers and integers are multiples of 16 if `aligned`, as Triton finds out at a launch.
    """
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if aligned and signature[name].startswith(("*", "i"))
    }
    positions = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, positions, divisible)
    made = triton.compile(source, target=GPUTarget("cuda", capability, WARP)).asm
    return {"ptx": made["ptx"], "resources": resources(made["cubin"])}


def resources(machine_code: bytes) -> str:
    """Registers, stack and local memory, as ``REG:32 STACK:0 LOCAL:0``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def copy_rows(dtype: str, capability: int, **options: Any) -> Code:
    """A launch as a stage makes it: the stream, cos and sin."""
    types = {"positions": "*i64", "batch": "i32", "active": "i32", "length": "i32"}
    nothing = {}
    for i in range(compact.TENSORS):
        if i == compact.TENSORS - 1:
            nothing |= {f"source_{i}": None, f"result_{i}": None}
        else:
            types |= {f"source_{i}": f"*{dtype}", f"result_{i}": f"*{dtype}"}
        types |= {f"{name}_{i}": "i32" for name in ("width", "source_rows", "batch_rows", "end")}
    return code(compact._copy_rows, types, capability, COUNT=3, BLOCK=compact.BLOCK, **nothing, **options)


def write_rows(dtype: str, capability: int, **options: Any) -> Code:
    types = {"stream": f"*{dtype}", "rows": f"*{dtype}", "positions": "*i64"}
    types |= dict.fromkeys(("length", "active", "width"), "i32")
    return code(restore._write_rows, types, capability, BLOCK=restore.BLOCK, **options)


def split_logits(dtype: str, capability: int, group: int = 1, **options: Any) -> Code:
    types = {"query": f"*{dtype}", "keys": f"*{dtype}", "lengths": "*i64", "scale": "fp32"}
    types |= dict.fromkeys(("logits", "maxima", "sums"), "*fp32")
    sizes = ("kv_heads", "length", "splits", "width", "batch_stride", "head_stride", "key_stride")
    types |= dict.fromkeys(sizes, "i32")
    blocks = {"BLOCK_KEYS": scores.BLOCK_KEYS, "BLOCK_WIDTH": 128}
    return code(scores._split_logits, types, capability, GROUP=group, **blocks, **options)


def mean_over_heads(capability: int) -> Code:
    types = dict.fromkeys(("logits", "maxima", "sums", "scores"), "*fp32")
    types |= {"visual_index": "*i64", "lengths": "*i64"}
    types |= dict.fromkeys(("heads", "length", "splits", "tokens"), "i32")
    blocks = {name: getattr(scores, name) for name in ("BLOCK_TOKENS", "BLOCK_HEADS", "BLOCK_SPLITS")}
    return code(scores._mean_over_heads, types, capability, **blocks)


def rank(capability: int, several_pools: bool) -> Code:
    types = {"scores": "*fp32", "keep": "*i1", "kept": "*i1", "pools": "*i64", "tokens": "i32"}
    blocks = {name: getattr(select, name) for name in ("BLOCK", "BLOCK_OTHERS")}
    return code(select._rank, types, capability, SEVERAL_POOLS=several_pools, **blocks)


def place(capability: int) -> Code:
    types = {"kept": "*i1"} | dict.fromkeys(("visual_index", "lengths", "positions"), "*i64")
    types |= dict.fromkeys(("tokens", "length", "slots"), "i32")
    blocks = {name: getattr(select, name) for name in ("BLOCK_SLOTS", "BLOCK_TOKENS")}
    return code(select._place, types, capability, **blocks)


def everything(capability: int) -> dict[str, Code]:
    made = {"mean_over_heads": mean_over_heads(capability)}
    for dtype in ("fp32", "fp16", "bf16"):
        made[f"copy_rows {dtype}"] = copy_rows(dtype, capability)
        made[f"write_rows {dtype}"] = write_rows(dtype, capability)
        for group in (1, 7):
            made[f"split_logits {dtype} {group}"] = split_logits(dtype, capability, group)
        made[f"copy_rows {dtype} unaligned"] = copy_rows(dtype, capability, aligned=False)
        made[f"write_rows {dtype} unaligned"] = write_rows(dtype, capability, aligned=False)
    made["rank pool"], made["rank pools"] = rank(capability, False), rank(capability, True)
    made["place"] = place(capability)
    return made


if __name__ == "__main__":
    print(json.dumps(everything(int(sys.argv[1]))))
