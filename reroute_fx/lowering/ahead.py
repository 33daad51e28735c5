"""Compile each distinct region ahead of time into a package of machine code that takes its weights at each call.

A package holds no weights, so that all layers and all programs share one copy of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import Dim, ExportedProgram

from ..errors import CaptureError
from .implementations import use_implementations
from .regions import is_size, share_regions
from .schedule import Schedule

_EXAMPLE_SIZES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43)
"""Of the tensors that a region is traced with: no two sizes are equal, and none is special."""


@dataclass(frozen=True)
class Scheduled:
    """A program as a schedule, and the graphs of its regions."""

    schedule: Schedule
    regions: tuple[fx.GraphModule, ...]


def schedule(program: ExportedProgram) -> Scheduled:
    """Split a program that `route` or `continuation` returned into its distinct regions."""
    graphs: list[fx.GraphModule] = []

    def keep(region: fx.GraphModule) -> Any:
        graphs.append(region)
        return region.forward

    regions = share_regions(program.graph_module, keep)
    return Scheduled(Schedule.of(program, regions), tuple(graphs))


def package_region(region: fx.GraphModule, device: torch.device, path: Path) -> None:
    """Compile a region for `device`, for tensors of any size, into the package `path`.

    Raises:
        CaptureError: the region was fixed to a size.
    """
    _take_lengths(region)
    fakes = [n.meta["val"] for n in region.graph.find_nodes(op="placeholder")]
    shapes = [fake.shape if isinstance(fake, torch.Tensor) else (fake,) for fake in fakes]
    examples = _examples(fakes, shapes, device)
    dynamic = tuple(
        {dim: Dim.AUTO for dim, size in enumerate(shape) if not isinstance(size, int)} for shape in shapes
    )
    use_implementations(region, device)
    with torch.no_grad():
        exported = torch.export.export(_Region(region), examples, dynamic_shapes=(dynamic,), strict=False)
    _check_sizes(exported, shapes)
    torch._inductor.aoti_compile_and_package(exported, package_path=str(path))


class _Region(torch.nn.Module):
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
    """Tensors of which sizes are equal where their symbols are."""
    chosen: dict[Any, int] = {}

    def size(symbol: Any) -> int:
        if isinstance(symbol, int):
            return symbol
        return chosen.setdefault(symbol.node.expr, _EXAMPLE_SIZES[len(chosen)])

    dtypes = [fake.dtype if isinstance(fake, torch.Tensor) else torch.bool for fake in fakes]
    return tuple(
        torch.zeros([size(s) for s in shape], dtype=dtype, device=device)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )


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


def load_region(path: Path) -> Callable[[list[torch.Tensor]], list[torch.Tensor]]:
    """The function that `package_region` compiled."""
    run: Callable[[list[torch.Tensor]], list[torch.Tensor]]
    # What is around the loader parses its description of inputs at every call.
    run = torch._inductor.aoti_load_package(str(path)).loader.boxed_run
    return run
