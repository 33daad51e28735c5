"""Settings under which modules of transformers are traced."""

from collections.abc import Iterator
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


@torch.no_grad()
def first_output(program: ExportedProgram, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a program returns first, run as it is; `inputs` by the names of its placeholders."""
    state = {**program.state_dict, **program.constants}
    flat = [
        inputs[spec.arg.name] if spec.kind is InputKind.USER_INPUT else state[spec.target]
        for spec in program.graph_signature.input_specs
    ]
    output: torch.Tensor = program.graph_module(*flat)[0]
    return output
