"""Compile the regions of 7B decoders for a GPU that is not there; write what Inductor generates as JSON.

    python inductor_for_cuda.py RESULT

Regions are those of a routed prompt and of the tokens that follow it, handed to Inductor as the product hands them.
It asks the device about itself, which stand-ins answer for an H100; attention is one call, as it is of a library.
Nothing is launched. Run in a process of its own: the tests interpret kernels, which Triton settles as it is imported.
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from compile_to_ptx import WARP, resources
from torch import fx
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import async_compile, config, scheduler
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.runtime import triton_helpers
from torch.fx.node import map_aggregate
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
)
from triton.backends.compiler import GPUTarget

from reroute_fx import RoutingConfig
from reroute_fx.capture import capture_decoder
from reroute_fx.lowering.implementations import use_implementations
from reroute_fx.lowering.inductor.compiled_regions import _compile_graph
from reroute_fx.lowering.inductor.sizes import Sizes
from reroute_fx.lowering.regions import share_regions
from reroute_fx.pipeline import continuation, route

aten, reroute = torch.ops.aten, torch.ops.reroute
CUDA = torch.device("cuda")
BATCH, LENGTH = 8, 616
"""Sizes of the call for which Inductor chooses: rows, and places of streams and caches."""
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    gcnArchName="",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block_optin=232448,
    warp_size=WARP,
)
DECODERS = {
    "llava-1.5-7b": LlamaConfig(hidden_size=4096, intermediate_size=11008, num_attention_heads=32),
    "qwen2-7b": Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4
    ),
}
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace { C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>) }
"""
"""Without a guard for CUDA, builds of torch for CPU take no operator apart whose tensors say that they lie there."""


@torch.library.custom_op("stand_in::attention", mutates_args=())
def attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Where a library's kernel is called."""
    raise AssertionError("nothing runs here")


@attention.register_fake
def _(query: Any, keys: Any, values: Any, mask: Any) -> torch.Tensor:
    return torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def call_attention(query: Any, keys: Any, values: Any, mask: Any = None, *_: Any, **__: Any) -> torch.Tensor:
    return attention(query, keys, values, mask)


class Collected:
    """What `AsyncCompile.triton` is asked to compile."""

    def __init__(self) -> None:
        self.kernels: list[dict[str, Any]] = []

    def triton(self, name: str, source: str, device_str: str = "cuda") -> Any:
        kernel = async_compile._load_triton_kernel_from_source(name, source)
        made = [kernel._precompile_config(each).kernel.asm for each in kernel.configs]
        meta = kernel.triton_meta
        hints = kernel.size_hints or {}
        self.kernels.append(
            {
                "name": name,
                "types": sorted({kind for kind in meta["signature"].values() if kind.startswith("*")}),
                "constants": {key: n for key, n in meta["constants"].items() if isinstance(n, int)},
                "elements": torch.Size(hints.values()).numel() if hints else None,
                "codes": [{"ptx": asm["ptx"], "resources": resources(asm["cubin"])} for asm in made],
            }
        )
        return kernel


@contextmanager
def pretended_device(collected: Collected) -> Iterator[None]:
    """Whoever asks finds an H100; what it would compile is collected."""
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, WARP),
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: CUDA,
    )
    triton.runtime.driver.set_active(driver)
    answers = {
        (torch.cuda, CudaInterface): {
            "get_device_properties": lambda device=None: H100,
            "current_device": lambda: 0,
            "device_count": lambda: 1,
        },
        (torch.cuda,): {"get_device_capability": lambda device=None: (9, 0)},
        (CudaInterface,): {
            "get_compute_capability": lambda device=None: 90,
            "is_available": lambda: True,
            "is_triton_capable": lambda device=None: True,
            "is_bf16_supported": lambda including_emulation=False: True,
        },
        (scheduler,): {"has_triton": lambda: True},
        (triton_helpers,): {"set_driver_to_gpu": lambda: None},
        (PythonWrapperCodegen,): {"generate_and_run_autotune_block": lambda self: None},
        (async_compile.AsyncCompile,): {
            "triton": lambda self, *given, **more: collected.triton(*given, **more)
        },
    }
    with ExitStack() as stack:
        for owners, functions in answers.items():
            for owner in owners:
                for name, function in functions.items():
                    is_static = owner is CudaInterface
                    value = staticmethod(function) if is_static else function
                    stack.enter_context(mock.patch.object(owner, name, value))
        current = mock.patch.object(torch._C, "_cuda_getCurrentRawStream", create=True, return_value=0)
        stack.enter_context(current)
        settings = {"compile_threads": 1, "fx_graph_cache": False, "use_static_cuda_launcher": False}
        stack.enter_context(config.patch(settings))
        yield


def load_guard() -> None:
    include, libraries = (Path(torch.__file__).parent / name for name in ("include", "lib"))
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(GUARD)
        options = ["-shared", "-fPIC", "-std=c++20", f"-I{include}", f"-L{libraries}", "-lc10"]
        subprocess.run([get_cpp_compiler(), source, "-o", library, *options], check=True)
        ctypes.CDLL(str(library))


def build(text: Any) -> PreTrainedModel:
    """A model of two layers without memory."""
    text.update({"num_hidden_layers": 2, "vocab_size": 1000, "head_dim": 128})
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=999)
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config).eval().to(torch.bfloat16)


def distinct_regions(program: torch.export.ExportedProgram) -> list[fx.GraphModule]:
    """Those that are compiled."""
    found: list[fx.GraphModule] = []

    def keep(region: fx.GraphModule) -> Any:
        found.append(region)
        return region.forward

    share_regions(program.graph_module, keep)
    return found


def kind(region: fx.GraphModule) -> str:
    targets = {node.target for node in region.graph.nodes}
    if reroute.select_tokens.default in targets:
        return "decision"
    return "layer" if aten.scaled_dot_product_attention.default in targets else "masks and angles"


def on_cuda(region: fx.GraphModule) -> fx.GraphModule:
    """The region, as it is when a model lies on a GPU."""

    def there(argument: Any) -> Any:
        return CUDA if isinstance(argument, torch.device) else argument

    for node in region.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            with value.fake_mode:
                moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)
            node.meta["val"] = moved
        node.args, node.kwargs = map_aggregate((node.args, node.kwargs), there)
        if node.target is aten.scaled_dot_product_attention.default:
            node.target = call_attention
    return use_implementations(region, CUDA)


def example_sizes(values: list[Any]) -> list[Any]:
    """What `Sizes` reads of a call's inputs: rows are the first sizes of tensors."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    rows = {str(tensor.shape[0]) for tensor in tensors if tensor.dim() > 1}

    def number(size: Any) -> int:
        return size if isinstance(size, int) else BATCH if str(size) in rows else LENGTH

    return [
        SimpleNamespace(shape=[number(size) for size in value.shape])
        if isinstance(value, torch.Tensor)
        else number(value)
        for value in values
    ]


def generated(region: fx.GraphModule) -> list[dict[str, Any]]:
    """The kernels that Inductor makes of a region on CUDA."""
    values = [node.meta["val"] for node in region.graph.find_nodes(op="placeholder")]
    collected = Collected()
    with pretended_device(collected), torch.no_grad():
        _compile_graph(region, Sizes(values, example_sizes(values), dynamic=True))
    return collected.kernels


def sum_of_streams(width: int) -> fx.GraphModule:
    """A region that adds two streams ``[B, S, width]``."""
    sizes = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    streams = tuple(torch.zeros(3, 5, width, dtype=torch.bfloat16) for _ in range(2))

    class Add(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    program = torch.export.export(Add(), streams, dynamic_shapes=(sizes, sizes))
    return fx.GraphModule({}, program.graph)


def main() -> None:
    torch._logging.set_logs(all=40)
    load_guard()
    made = {}
    for name, text in DECODERS.items():
        captured = capture_decoder(build(text))
        programs = {
            "prompt": route(captured.program, RoutingConfig((1,), (0.25,)), num_layers=2)[0],
            "following": continuation(captured.program, (1,), 2),
        }
        for role, program in programs.items():
            for region in distinct_regions(program):
                key = f"{name}, {role}: {kind(region)}"
                made[key] = generated(on_cuda(region))
    for width in (4096, 4099):
        made[f"sum of width {width}"] = generated(on_cuda(sum_of_streams(width)))
    Path(sys.argv[1]).write_text(json.dumps(made))


if __name__ == "__main__":
    main()
