"""Which operators of a routed program Torch-TensorRT converts, and which it leaves to PyTorch."""

import importlib
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import fx
from torch.export import ExportedProgram

from ...common.tables import as_text
from .decompositions import decompose, load_recorded

OUTSIDE = "outside"
"""What a node that belongs to no region is said to be in."""


@dataclass(frozen=True)
class Support:
    """Whether a call can be converted.

    Attributes:
        is_converted: it can, if `reason` holds.
        reason: why not, or what Torch-TensorRT checks when it converts the call; empty if nothing.
    """

    is_converted: bool
    reason: str = ""


@dataclass(frozen=True)
class OperatorCoverage:
    """What becomes of the calls of one operator.

    Attributes:
        name: as torch prints it, ``aten.add.Tensor``.
        calls: for each program how often it is called.
        regions: parts of the decoder in which it is called: ``layer.3``, ``decision.7``, ``outside``.
        is_converted: Torch-TensorRT converts it; otherwise PyTorch runs it between two engines.
        reason: see `Support`.
    """

    name: str
    calls: dict[str, int]
    regions: tuple[str, ...]
    is_converted: bool
    reason: str


@dataclass(frozen=True)
class Coverage:
    """Every operator of decomposed programs.

    Attributes:
        source: where the list of converters comes from.
        operators: sorted by name; an operator of which only some calls are converted is there twice.
    """

    source: str
    operators: tuple[OperatorCoverage, ...]

    @property
    def left(self) -> tuple[OperatorCoverage, ...]:
        """What PyTorch runs."""
        return tuple(entry for entry in self.operators if not entry.is_converted)

    @property
    def programs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for entry in self.operators for name in entry.calls))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        entries = [{**asdict(entry), "regions": list(entry.regions)} for entry in self.operators]
        return {"source": self.source, "operators": entries}

    def __str__(self) -> str:
        return as_text(self, width=120)

    def __rich__(self) -> RenderableType:
        table = Table(title="Operators for TensorRT", caption=f"Converters: {self.source}")
        table.add_column("operator", no_wrap=True)
        for program in self.programs:
            table.add_column(program, justify="right")
        for heading in ("in", "by", "note"):
            table.add_column(heading)
        notes = list(dict.fromkeys(entry.reason for entry in self.operators if entry.reason))
        for entry in self.operators:
            table.add_row(
                entry.name,
                *(str(entry.calls.get(program, 0)) for program in self.programs),
                ", ".join(dict.fromkeys(region.partition(".")[0] for region in entry.regions)),
                "TensorRT" if entry.is_converted else "PyTorch",
                str(notes.index(entry.reason) + 1) if entry.reason else "",
            )
        calls = sum(sum(entry.calls.values()) for entry in self.operators)
        left = sum(sum(entry.calls.values()) for entry in self.left)
        lines = [f"{calls - left} of {calls} calls are converted, {left} are left to PyTorch."]
        lines += [f"{number} {note}" for number, note in enumerate(notes, start=1)]
        return Group(table, *map(Text, lines))


def coverage(routed: Any) -> Coverage:
    """What Torch-TensorRT makes of the programs of a model that `reroute_fx.compile` returned."""
    return coverage_of({name: executable.program for name, executable in routed.programs.items()})


def coverage_of(programs: Mapping[str, ExportedProgram]) -> Coverage:
    """What Torch-TensorRT makes of programs as `route` and `continuation` return them.

    Asks the converter registry of the installed Torch-TensorRT, or else the recorded list of a release.
    """
    return coverage_of_decomposed({name: decompose(program) for name, program in programs.items()})


def coverage_of_decomposed(programs: Mapping[str, ExportedProgram]) -> Coverage:
    """The same for programs as `decompose` returns them."""
    source, support = _converters()
    calls: dict[tuple[str, bool, str], Counter[str]] = {}
    regions: dict[tuple[str, bool, str], set[str]] = {}
    for name, program in programs.items():
        for node in program.graph.nodes:
            if node.op != "call_function":
                continue
            found = support(node)
            key = target_name(node.target), found.is_converted, found.reason
            calls.setdefault(key, Counter())[name] += 1
            regions.setdefault(key, set()).add(node.meta.get("region") or OUTSIDE)
    return Coverage(
        source,
        tuple(
            OperatorCoverage(key[0], dict(calls[key]), tuple(sorted(regions[key])), *key[1:])
            for key in sorted(calls)
        ),
    )


def _converters() -> tuple[str, Callable[[fx.Node], Support]]:
    """Where the list of converters comes from, and what it says of a call."""
    try:
        version = importlib.import_module("torch_tensorrt").__version__
        registry = importlib.import_module("torch_tensorrt.dynamo.conversion._ConverterRegistry")
    except Exception:  # The library raises a plain Exception when its native part is missing.
        recorded = load_recorded()
        source = f"recorded list of torch_tensorrt {recorded['version']} ({recorded['recorded']})"
        return source, _Recorded(recorded["converters"]).support
    source = f"registry of the installed torch_tensorrt {version}"
    return source, lambda node: _registered(registry.DYNAMO_CONVERTERS, node)


def _registered(registry: Any, node: fx.Node) -> Support:
    if registry.get(node) is not None:
        return Support(True)
    if registry.get_unvalidated(node.target) is None:
        return Support(False, "no converter")
    return Support(False, "its converters don't take this call")


class _Recorded:
    """What a recorded list of converters says."""

    def __init__(self, converters: list[dict[str, Any]]) -> None:
        self.by_target: dict[str, list[dict[str, Any]]] = {}
        for entry in converters:
            self.by_target.setdefault(entry["target"], []).append(entry)

    def support(self, node: fx.Node) -> Support:
        name = target_name(node.target)
        # A converter may be registered for the operator whatever the overload.
        entries = [*self.by_target.get(name, ()), *self.by_target.get(name.removesuffix(".default"), ())]
        if not entries:
            return Support(False, "no converter")
        if has_symbolic_sizes(node):
            entries = [entry for entry in entries if entry["supports_dynamic_shapes"]]
        if not entries:
            return Support(False, "its converter does not take symbolic sizes")
        conditions = [tuple(_conditions(entry)) for entry in entries]
        if () in conditions:
            return Support(True)
        return Support(True, " or ".join(dict.fromkeys("; ".join(parts) for parts in conditions)))


def _conditions(entry: Mapping[str, Any]) -> Iterator[str]:
    """What Torch-TensorRT checks before it uses a converter; the recorded list can't say whether it holds."""
    if entry["only_if"]:
        yield f"only if {entry['only_if']}"
    if entry["validator"]:
        yield f"validated by Torch-TensorRT at conversion: {entry['validator']}"
    if entry["requires_output_allocator"]:
        yield "needs an output allocator"


def target_name(target: Any) -> str:
    """A call's target as the recorded list names it: ``aten.add.Tensor``, ``operator.mul``, ``torch.sym_not``."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    name = getattr(target, "__name__", str(target))
    module = "operator" if getattr(operator, name, None) is target else "torch"
    return f"{module}.{name}"


def has_symbolic_sizes(node: fx.Node) -> bool:
    """Whether a call returns or takes a size, or a tensor of a size, that is not fixed."""
    return any(_is_symbolic(n.meta.get("val")) for n in (node, *node.all_input_nodes))


def _is_symbolic(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return any(_is_symbolic(size) for size in value.shape)
    if isinstance(value, list | tuple):
        return any(_is_symbolic(element) for element in value)
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)
