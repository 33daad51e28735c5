"""A lowered program as data: which region is called on which values, in which order.

Values are numbered: first the inputs, then the weights, then what each call returns. A region that needs a size which
none of its tensors has takes an empty tensor of that length. Compiled regions are files of their own.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from transformers.modeling_outputs import BaseModelOutput

from ..common.pauses import pause
from ..errors import ArtifactError
from .device import on_device
from .operator_list import OperatorList, from_operator_list
from .regions import Regions, is_size

HIDDEN = "last_hidden_state"
_MOST_DIMENSIONS, _MOST_OUTPUTS = 8, 2**16


@dataclass(frozen=True)
class RegionCall:
    """A call of a region.

    Attributes:
        region: its number; those that are compiled come first.
        inputs: values that it takes.
        lengths: then come empty tensors as long as these values are in these dimensions.
        outputs: how many values it returns.
    """

    region: int
    inputs: tuple[int, ...]
    lengths: tuple[tuple[int, int], ...]
    outputs: int


@dataclass(frozen=True)
class CallSchedule:
    """A program over regions.

    Attributes:
        inputs: names of the inputs.
        weights: names of the weights.
        calls: in order.
        outputs: values that the program returns, by name.
        others: regions that are not compiled.
    """

    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    calls: tuple[RegionCall, ...]
    outputs: dict[str, int]
    others: tuple[OperatorList, ...] = ()

    @classmethod
    def of(
        cls, program: ExportedProgram, regions: Regions, others: Sequence[OperatorList] = ()
    ) -> "CallSchedule":
        """The schedule of a program that `route` or `continuation` returned, or one that returns tensors by name.

        Args:
            program: what is scheduled.
            regions: its regions.
            others: those that are not compiled, as data.
        """
        specs = program.graph_signature.input_specs
        inputs = program.graph_signature.user_inputs
        weights = {s.arg.name: str(s.target) for s in specs if s.kind is not InputKind.USER_INPUT}
        reader = _Reader(regions, (*inputs, *weights))
        calls = tuple(map(reader.call, reader.calls()))
        outputs = reader.outputs(program.call_spec.out_spec)
        return cls(inputs, tuple(weights.values()), calls, outputs, tuple(others))

    @classmethod
    def from_json(cls, data: Any, compiled: int, result: str = HIDDEN) -> "CallSchedule":
        """Read what `to_json` wrote, for a program of as many compiled regions that returns `result`.

        Raises:
            ArtifactError: it is something else, or reads a value that is not there yet.
        """
        try:
            calls = [
                RegionCall(c["region"], tuple(c["inputs"]), tuple(map(tuple, c["lengths"])), c["outputs"])
                for c in data["calls"]
            ]
            schedule = cls(
                tuple(data["inputs"]),
                tuple(data["weights"]),
                tuple(calls),
                dict(data["outputs"]),
                tuple(data["others"]),
            )
            schedule._check(compiled + len(schedule.others), result)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"The schedule of a program is damaged ({type(error).__name__}: {error}). Export the model again."
            ) from error
        return schedule

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def _check(self, regions: int, result: str) -> None:
        """Raise ValueError unless all names are strings and all numbers stand for something."""
        names = (*self.inputs, *self.weights, *self.outputs)
        if not all(isinstance(name, str) for name in names) or result not in self.outputs:
            raise ValueError("names are missing")
        count = len(self.inputs) + len(self.weights)
        for call in self.calls:
            _check_number(call.region, regions)
            for value in (*call.inputs, *(value for value, _ in call.lengths)):
                _check_number(value, count)
            for _, dim in call.lengths:
                _check_number(dim, _MOST_DIMENSIONS)
            _check_number(call.outputs, _MOST_OUTPUTS)
            count += call.outputs
        for value in self.outputs.values():
            _check_number(value, count)


def _check_number(number: Any, end: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < end:
        raise ValueError(f"{number!r} is not in 0..{end - 1}")


class _Reader:
    """Numbers the values of the graph that `share_regions` makes."""

    def __init__(self, regions: Regions, placeholders: Sequence[str]) -> None:
        self.graph = regions.module.graph
        functions = (*regions.compiled, *regions.others)
        self.regions: dict[Callable[..., Any], int] = {f: i for i, f in enumerate(functions)}
        self.count = len(placeholders)
        self.values = {n: placeholders.index(n.name) for n in self.graph.find_nodes(op="placeholder")}

    def calls(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op == "call_function" and n.target in self.regions]

    def call(self, node: fx.Node) -> RegionCall:
        tensors = [n for n in node.all_input_nodes if not is_size(n)]
        lengths: list[Any] = [n.args for n in node.all_input_nodes if is_size(n)]
        results: dict[fx.Node, Any] = {n: n.args[1] for n in node.users if n.target is operator.getitem}
        made = RegionCall(
            self.regions[node.target],  # type: ignore[index]
            tuple(self.values[n] for n in tensors),
            tuple((self.values[tensor], dim) for tensor, dim in lengths),
            1 + max(results.values(), default=-1),
        )
        self.values |= {n: self.count + place for n, place in results.items()}
        self.count += made.outputs
        return made

    def outputs(self, spec: pytree.TreeSpec) -> dict[str, int]:
        returned: Any = self.graph.output_node().args[0]
        whole = pytree.tree_unflatten(list(returned), spec)
        return {name: self.values[node] for name, node in by_name(whole).items()}


class ScheduledProgram:
    """Runs a schedule on compiled regions.

    Args:
        schedule: what is called.
        compiled: for each region that is compiled a function from a list of tensors to a list of tensors.
        weights: by name.

    Raises:
        ArtifactError: a region that is not compiled is damaged.
    """

    def __init__(
        self,
        schedule: CallSchedule,
        compiled: Sequence[Callable[[list[torch.Tensor]], list[torch.Tensor]]],
        weights: Mapping[str, torch.Tensor],
    ) -> None:
        self.schedule = schedule
        self.regions = [*compiled, *map(from_operator_list, schedule.others)]
        self.weights = [weights[name] for name in schedule.weights]
        self.released = _last_uses(schedule)

    @torch.no_grad()
    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run on contiguous inputs; returns the outputs by name."""
        values: list[Any] = [*(inputs[name] for name in self.schedule.inputs), *self.weights]
        with on_device(values[0].device):
            for call, released in zip(self.schedule.calls, self.released, strict=True):
                pause()
                given = [values[i] for i in call.inputs]
                given += [
                    values[i].new_empty(values[i].shape[dim], dtype=torch.bool) for i, dim in call.lengths
                ]
                values += self.regions[call.region](given)
                for i in released:
                    values[i] = None
        return {name: values[i] for name, i in self.schedule.outputs.items()}


def by_name(results: dict[str, Any]) -> dict[str, Any]:
    """Results of a program by name: those of a routed one are ``{"output": ..., "routing": ...}``."""
    if "routing" not in results:
        return results
    return {HIDDEN: results["output"].last_hidden_state, **results["routing"]}


def as_executable(values: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What an `Executable` of a routed program returns, from the program's outputs by name."""
    routing = dict(values)
    output = BaseModelOutput(last_hidden_state=routing.pop(HIDDEN))
    return {"output": output, "routing": routing}


def _last_uses(schedule: CallSchedule) -> list[list[int]]:
    """For each call the values that nothing reads after it, so that their memory is free."""
    read: dict[int, int] = {}
    count = len(schedule.inputs) + len(schedule.weights)
    for number, call in enumerate(schedule.calls):
        read |= dict.fromkeys((*call.inputs, *(i for i, _ in call.lengths)), number)
        read |= {count + i: number for i in range(call.outputs)}
        count += call.outputs
    kept = set(schedule.outputs.values())
    released: list[list[int]] = [[] for _ in schedule.calls]
    for value, number in read.items():
        if value not in kept:
            released[number].append(value)
    return released
