"""Settings under which modules of transformers are traced."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.overrides import TorchFunctionMode
from transformers.utils import logging


@contextmanager
def quiet() -> Iterator[None]:
    """The exporter warns that it is experimental on every export; errors still show."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


class GradModeStays(TorchFunctionMode):
    """Inside, nothing is recorded of switches of the gradient mode to what it is already.

    torch.export would cut the program at each of them and put it together again.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch._C._set_grad_enabled and args[0] == torch.is_grad_enabled():
            return None
        return function(*args, **(kwargs or {}))


def keeping_grad_mode(module: torch.nn.Module) -> None:
    """Let a module run inside `GradModeStays`."""
    base: Any = type(module)

    def forward(self: Any, **given: Any) -> Any:
        with GradModeStays():
            return base.forward(self, **given)

    module.__class__ = type(base.__name__, (base,), {"forward": forward})


def without_writes(program: ExportedProgram) -> ExportedProgram:
    """The same program without writes into parts of tensors, as ``x[..., 1:60:3] = y`` leaves them behind."""
    if not program.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
        return program
    decomposed: ExportedProgram = program.run_decompositions({})
    return decomposed


@torch.no_grad()
def outputs(program: ExportedProgram, inputs: dict[str, torch.Tensor]) -> Sequence[torch.Tensor]:
    """What a program returns, run as it is; `inputs` by the names of its placeholders."""
    state = {**program.state_dict, **program.constants}
    flat = [
        inputs[spec.arg.name] if spec.kind is InputKind.USER_INPUT else state[spec.target]
        for spec in program.graph_signature.input_specs
    ]
    returned: Sequence[torch.Tensor] = program.graph_module(*flat)
    return returned
