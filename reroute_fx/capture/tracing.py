"""Settings under which modules of transformers are traced."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
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
