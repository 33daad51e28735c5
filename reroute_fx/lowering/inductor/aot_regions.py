"""Compile each distinct region ahead of time into a package of machine code that takes its weights at each call.

A package holds no weights, so that all layers and all programs share one copy of them.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import fx
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.export import Dim, ExportedProgram

from ...errors import BackendUnavailableError, CaptureError
from ...passes.graph_edit import hint, memory_order
from ..attention_kernels import pin_attention
from ..call_schedule import CallSchedule
from ..device import check_cuda_toolkit
from ..example_sizes import ExampleSizes
from ..implementations import use_implementations
from ..operator_list import OperatorList, to_operator_list
from ..regions import device_key, is_size, share_regions


@dataclass(frozen=True)
class Scheduled:
    """A program as a schedule, and the graphs of the regions that are to be compiled."""

    schedule: CallSchedule
    regions: tuple[fx.GraphModule, ...]


def schedule(program: ExportedProgram) -> Scheduled:
    """Split a program that `route` or `continuation` returned into its distinct regions."""
    graphs: list[fx.GraphModule] = []
    others: list[OperatorList] = []

    def keep(region: fx.GraphModule) -> Any:
        graphs.append(region)
        return region.forward

    def write_down(region: fx.GraphModule) -> Any:
        taking_lengths = copy.deepcopy(region)
        _take_lengths(taking_lengths)
        operators = to_operator_list(taking_lengths.graph)
        if operators is None:
            return None
        others.append(operators)
        return region.forward

    regions = share_regions(program.graph_module, keep, write_down)
    return Scheduled(CallSchedule.of(program, regions, others), tuple(graphs))


_packages: dict[str, bytes] = {}
"""What was compiled in this process: artifacts of one model at several tiers have their regions in common."""


def package_region(region: fx.GraphModule, device: torch.device) -> bytes:
    """Compile a region for `device`, for tensors of any size, into a package; the region is not changed.

    Raises:
        BackendUnavailableError: there is no compiler.
        CaptureError: the region was fixed to a size.
    """
    check_compiler(device)
    key = device_key(region, device)
    if key not in _packages:
        _packages[key] = _compile(copy.deepcopy(region), device)
    return _packages[key]


def check_compiler(device: torch.device) -> None:
    """Raise BackendUnavailableError unless packages for `device` can be compiled.

    All of them have code for the processor and need a C++ compiler; those for a GPU need the CUDA toolkit as well.
    """
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise BackendUnavailableError(
            "No C++ compiler was found; expected g++ or clang++ to compile programs ahead of time. Install one (on "
            "Debian or Ubuntu apt install g++, with conda gxx) or name it in the environment variable CXX."
        ) from error
    if device.type == "cuda":
        check_cuda_toolkit()


def _compile(region: fx.GraphModule, device: torch.device) -> bytes:
    _take_lengths(region)
    fakes = [n.meta["val"] for n in region.graph.find_nodes(op="placeholder")]
    shapes = [fake.shape if isinstance(fake, torch.Tensor) else (fake,) for fake in fakes]
    examples = _examples(fakes, shapes, device)
    dynamic = tuple(
        {dim: Dim.AUTO for dim, size in enumerate(shape) if not isinstance(size, int)} for shape in shapes
    )
    use_implementations(region, device)
    pin_attention(region, device)
    with torch.no_grad():
        exported = torch.export.export(
            _RegionModule(region), examples, dynamic_shapes=(dynamic,), strict=False
        )
    _check_sizes(exported, shapes)
    with TemporaryDirectory() as folder:
        path = Path(folder, "region.pt2")
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path))
        return path.read_bytes()


class _RegionModule(torch.nn.Module):
    def __init__(self, region: fx.GraphModule) -> None:
        super().__init__()
        self.run = region.forward

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.run(*inputs)


def _take_lengths(region: fx.GraphModule) -> None:
    """Let a region take tensors for the sizes that it took.

    Before: ``%n`` a placeholder for a size
    After:  ``%n`` a placeholder for a tensor of that length, ``sym_size(%n, 0)``
    """
    for node in region.graph.find_nodes(op="placeholder"):
        if is_size(node):
            with region.graph.inserting_after(node):
                size = region.graph.call_function(torch.ops.aten.sym_size.int, (node, 0))
            node.replace_all_uses_with(size, delete_user_cb=lambda user, size=size: user is not size)
    region.recompile()


def _examples(fakes: Sequence[Any], shapes: Sequence[Any], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Tensors of which sizes are equal where their symbols are, laid out as what they stand for."""
    size = ExampleSizes()
    examples = []
    for fake, shape in zip(fakes, shapes, strict=True):
        sizes = [size(s) for s in shape]
        if isinstance(fake, torch.Tensor):
            example = torch.empty_permuted(sizes, _dense_order(fake), dtype=fake.dtype, device=device)
        else:
            example = torch.empty(sizes, dtype=torch.bool, device=device)
        examples.append(example.zero_())
    return tuple(examples)


def _dense_order(fake: torch.Tensor) -> list[int]:
    """`memory_order` of a tensor.

    Raises:
        CaptureError: it has gaps or overlaps, which would be misread: the program takes memory as it was compiled for.
    """
    order = memory_order(fake)
    sizes, strides = [hint(size) for size in fake.shape], [hint(stride) for stride in fake.stride()]
    dense = 1
    for dim in reversed(order):
        if sizes[dim] != 1 and strides[dim] != dense:
            raise CaptureError(
                f"A region takes a tensor of sizes {sizes} with strides {strides}; expected one without gaps. This is "
                f"a bug of reroute_fx; please report it."
            )
        dense *= sizes[dim]
    return order


def _check_sizes(exported: ExportedProgram, shapes: Sequence[Any]) -> None:
    """Sizes that were symbols are symbols still, and none stands for two that may differ."""
    stands_for: dict[Any, Any] = {}
    for node, shape in zip(exported.graph.find_nodes(op="placeholder"), shapes, strict=True):
        for size, symbol in zip(node.meta["val"].shape, shape, strict=True):
            if isinstance(symbol, int):
                continue
            wanted = symbol.node.expr
            # What was fixed while it was traced is still a SymInt, of a number.
            fixed = isinstance(size, int) or size.node.expr.is_number
            if fixed or stands_for.setdefault(size.node.expr, wanted) != wanted:
                raise CaptureError(
                    f"A region was fixed to size {size} where it should take any ({wanted}). This is a bug of "
                    f"reroute_fx or of torch {torch.__version__}; please report it."
                )


def load_region(path: Path, device: torch.device) -> Callable[[list[torch.Tensor]], list[torch.Tensor]]:
    """The function of a package, on `device`."""
    run: Callable[[list[torch.Tensor]], list[torch.Tensor]]
    # What is around the loader parses its description of inputs at every call.
    index = -1 if device.index is None else device.index
    run = torch._inductor.aoti_load_package(str(path), device_index=index).loader.boxed_run
    return run
