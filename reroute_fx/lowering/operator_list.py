"""A small graph as data: the operators that it calls, in order."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..errors import ArtifactError

OperatorList = dict[str, Any]
"""Plain JSON: how many values it takes, its calls, and which values it returns. Values are numbered: first those that
it takes, then what each call returns. Calls name an operator of `_LIBRARIES`.
"""
_LIBRARIES = ("aten", "reroute")
_ELEMENT = "element"
_KINDS = {"dtype": torch.dtype, "memory_format": torch.memory_format}


class _NoData(Exception):
    """Something that can't be written down."""


def to_operator_list(graph: fx.Graph) -> OperatorList | None:
    """A graph as data; None if it calls or is given what can't be written down, such as a device."""
    numbers = {
        node: {"value": i}
        for i, node in enumerate(n for n in graph.nodes if n.op in ("placeholder", "call_function"))
    }
    calls = [node for node in graph.nodes if node.op == "call_function"]
    try:
        return {
            "takes": len(numbers) - len(calls),
            "calls": [
                {
                    "operator": _name(node.target),
                    "args": [_write(argument, numbers) for argument in node.args],
                    "kwargs": {name: _write(argument, numbers) for name, argument in node.kwargs.items()},
                }
                for node in calls
            ],
            "returns": [_write(node, numbers) for node in graph.output_node().args[0]],  # type: ignore[union-attr]
        }
    except _NoData:
        return None


def _name(target: Any) -> str:
    if target is operator.getitem:
        return _ELEMENT
    if isinstance(target, torch._ops.OpOverload) and target.namespace in _LIBRARIES:
        return str(target)
    raise _NoData


def _write(argument: Any, numbers: dict[fx.Node, Any]) -> Any:
    if isinstance(argument, fx.Node):
        return numbers[argument]
    if isinstance(argument, (list, tuple)):
        return [_write(each, numbers) for each in argument]
    for kind, types in _KINDS.items():
        if isinstance(argument, types):
            return {kind: str(argument).removeprefix("torch.")}
    if argument is None or isinstance(argument, (bool, int, float, str)):
        return argument
    raise _NoData


@dataclass(frozen=True)
class _Value:
    """A value by its number."""

    number: int


def from_operator_list(data: Any) -> Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]:
    """What `to_operator_list` wrote as a function of a list of tensors.

    Raises:
        ArtifactError: it is something else.
    """
    try:
        calls = []
        for known, call in enumerate(data["calls"], start=data["takes"]):
            args = [_read(argument, known) for argument in call["args"]]
            kwargs = {str(name): _read(argument, known) for name, argument in call["kwargs"].items()}
            calls.append((_operator(call["operator"]), args, kwargs))
        returned = [_read(value, data["takes"] + len(calls)) for value in data["returns"]]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"The operators of a program are damaged ({type(error).__name__}: {error}). Export the model again."
        ) from error

    def run(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        values: list[Any] = list(tensors)
        for function, args, kwargs in calls:
            filled = {name: _filled(argument, values) for name, argument in kwargs.items()}
            values.append(function(*_filled(args, values), **filled))
        found: list[torch.Tensor] = _filled(returned, values)
        return found

    return run


def _operator(name: str) -> Callable[..., Any]:
    if name == _ELEMENT:
        return operator.getitem
    library, packet, overload = name.split(".")
    if library not in _LIBRARIES:
        raise ValueError(f"{name!r} is of none of the libraries {list(_LIBRARIES)}")
    found: Callable[..., Any] = getattr(getattr(getattr(torch.ops, library), packet), overload)
    return found


def _read(argument: Any, known: int) -> Any:
    """An argument as `_filled` takes it, that reads no value beyond those that are known."""
    if isinstance(argument, list):
        return [_read(each, known) for each in argument]
    if not isinstance(argument, dict):
        return argument
    ((kind, content),) = argument.items()
    if kind == "value":
        if isinstance(content, bool) or not isinstance(content, int) or not 0 <= content < known:
            raise ValueError(f"{content!r} is not in 0..{known - 1}")
        return _Value(content)
    found = getattr(torch, content)
    if not isinstance(found, _KINDS[kind]):
        raise ValueError(f"{content!r} is no {kind}")
    return found


def _filled(argument: Any, values: Sequence[Any]) -> Any:
    if isinstance(argument, _Value):
        return values[argument.number]
    if isinstance(argument, list):
        return [_filled(each, values) for each in argument]
    return argument
