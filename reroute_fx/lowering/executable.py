"""A lowered program that is called with its inputs by name."""

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from .._compat import independent_sizes
from ..errors import ConfigError
from . import inductor

BACKENDS = ("inductor", "eager")


class Executable:
    """Runs the graph of an exported program on the program's own parameters.

    Attributes:
        backend: name of the backend.
        regions: calls of compiled regions in one run; 0 on `eager`.
        distinct_regions: functions that are compiled for them.
    """

    def __init__(self, program: ExportedProgram, backend: str, module: fx.GraphModule) -> None:
        self.backend = backend
        self.regions = 0
        self.distinct_regions = 0
        self._module = module
        self._state = {**program.state_dict, **program.constants}
        self._inputs = [(s.kind, s.arg.name, s.target) for s in program.graph_signature.input_specs]
        self._out_spec = program.call_spec.out_spec

    @torch.no_grad()
    def __call__(self, **inputs: torch.Tensor) -> Any:
        """Run on contiguous inputs; returns what the program returns."""
        flat = [
            inputs[name] if kind is InputKind.USER_INPUT else self._state[target]
            for kind, name, target in self._inputs
        ]
        with independent_sizes():
            return pytree.tree_unflatten(self._module(*flat), self._out_spec)


def lower(program: ExportedProgram, backend: str = "inductor", dynamic: bool = True) -> Executable:
    """Lower a program.

    Args:
        program: as `reroute_fx.route` returns it; its regions are the graph's ``meta["region"]``.
        backend: ``"inductor"`` compiles each distinct region at its first call; ``"eager"`` runs the graph
            as it is.
        dynamic: compile for any batch size and length; otherwise for those of the first call, and again
            when they change.

    Raises:
        ConfigError: unknown backend.
    """
    check_backend(backend)
    if backend == "eager":
        return Executable(program, backend, program.graph_module)
    regions = inductor.lower(program.graph_module, dynamic)
    executable = Executable(program, backend, regions.module)
    executable.regions, executable.distinct_regions = regions.calls, regions.distinct
    return executable


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ConfigError(f"backend is {backend!r}; expected one of {list(BACKENDS)}.")
