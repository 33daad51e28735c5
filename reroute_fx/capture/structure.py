"""What a trace of a module depends on besides the values of its weights, so that modules that are alike share one."""

import enum
from collections.abc import Hashable
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch.export import ExportedProgram
from transformers import PreTrainedConfig

_TABLES = frozenset({"_modules", "_parameters", "_buffers"})
_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, enum.Enum, type)
_FUNCTIONS = (FunctionType, BuiltinFunctionType)


class _UnknownError(Exception):
    """Something of which nobody can say whether a trace depends on it."""


def structure_of(module: torch.nn.Module) -> Hashable | None:
    """Equal for modules that are traced into the same program; None where that can't be told.

    It holds classes, functions, configs and plain attributes of all modules in the tree, and of their parameters and
    buffers all but the values. Functions that modules find by name while they run, patched ones say, are not in it.
    """
    met: dict[int, int] = {}
    try:
        return tuple(
            (name, *_describe(part, met)) for name, part in module.named_modules(remove_duplicate=False)
        )
    except _UnknownError:
        return None


def _describe(module: torch.nn.Module, met: dict[int, int]) -> tuple[Any, ...]:
    """A module and its own tensors; `met` numbers them, so that what has two names shows."""
    own = module.__dict__
    tensors = tuple(
        (name, _of_tensor(tensor), met.setdefault(id(tensor), len(met)))
        for table in ("_parameters", "_buffers")
        for name, tensor in own[table].items()
    )
    attributes = tuple((name, _of(given)) for name, given in own.items() if name not in _TABLES)
    return type(module), met.setdefault(id(module), len(met)), tensors, attributes


def _of_tensor(tensor: torch.Tensor | None) -> Hashable:
    if tensor is None:
        return None
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise _UnknownError  # packed weights describe themselves in ways of their own
    return type(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.requires_grad


def _of(given: Any) -> Hashable:
    if isinstance(given, (*_PLAIN, *_FUNCTIONS)):
        # 1, 1.0 and True are equal.
        return type(given), given
    if isinstance(given, PreTrainedConfig):
        return type(given), given.to_json_string(use_diff=False), given._attn_implementation
    if isinstance(given, (tuple, list)):
        return type(given), tuple(map(_of, given))
    if isinstance(given, (set, frozenset)):
        return type(given), frozenset(map(_of, given))
    if isinstance(given, dict):
        return type(given), tuple((_of(name), _of(part)) for name, part in given.items())
    raise _UnknownError


def without_weights(program: ExportedProgram, module: torch.nn.Module) -> ExportedProgram | None:
    """A program that was traced from `module`, on nothing; None unless all its weights are those of their names."""
    named = _tensors(module)
    if any(named.get(name) is not weight for name, weight in program.state_dict.items()):
        return None
    nothing = torch.nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
    constants = {name: nothing.data if name in named else value for name, value in program.constants.items()}
    return _on(program, dict.fromkeys(program.state_dict, nothing), constants)


def with_weights(program: ExportedProgram, module: torch.nn.Module) -> ExportedProgram:
    """A program that `without_weights` returned, or that was made from one, on the weights of `module`."""
    named = _tensors(module)
    weights = {name: named[name] for name in program.state_dict}
    return _on(program, weights, {name: named.get(name, value) for name, value in program.constants.items()})


def with_weights_of(program: ExportedProgram, other: ExportedProgram) -> ExportedProgram:
    """A program that was made from one that `other` has the graph of, on the weights of `other`."""
    return _on(program, other.state_dict, other.constants)


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _on(program: ExportedProgram, weights: dict[str, Any], constants: dict[str, Any]) -> ExportedProgram:
    """The same program on other weights; the graph is shared."""
    return ExportedProgram(
        root=program.graph_module,
        graph=program.graph,
        graph_signature=program.graph_signature,
        state_dict=weights,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=None,
        constants=constants,
        verifiers=program.verifiers,
    )
