"""A lowered program that is called with its inputs by name."""

import logging
import time
from collections import Counter
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from .._compat import compilation_settings
from ..errors import ConfigError
from . import inductor

BACKENDS = ("inductor", "eager")
logger = logging.getLogger(__name__)


class Executable:
    """Runs the graph of an exported program on the program's own parameters.

    Attributes:
        name: what the program is for, in messages.
        backend: name of the backend.
        regions: calls of compiled regions in one run; 0 on `eager`.
        distinct_regions: functions that are compiled for them.
    """

    def __init__(
        self, program: ExportedProgram, backend: str, module: fx.GraphModule, name: str, counter: Counter[str]
    ) -> None:
        self.name = name
        self.backend = backend
        self.regions = 0
        self.distinct_regions = 0
        self._counter = counter
        self._first_compilation_seconds = 0.0
        self._module = module
        self._state = {**program.state_dict, **program.constants}
        self._inputs = [(s.kind, s.arg.name, s.target) for s in program.graph_signature.input_specs]
        self._out_spec = program.call_spec.out_spec

    @property
    def compilations(self) -> int:
        """How often a region was compiled so far."""
        return self._counter["compilations"]

    @torch.no_grad()
    def __call__(self, **inputs: torch.Tensor) -> Any:
        """Run on contiguous inputs; returns what the program returns."""
        flat = [
            inputs[name] if kind is InputKind.USER_INPUT else self._state[target]
            for kind, name, target in self._inputs
        ]
        before, start = self.compilations, time.perf_counter()
        with compilation_settings():
            result = pytree.tree_unflatten(self._module(*flat), self._out_spec)
        if self.compilations > before:
            self._tell(self.compilations - before, time.perf_counter() - start, inputs)
        return result

    def _tell(self, compilations: int, seconds: float, inputs: dict[str, torch.Tensor]) -> None:
        """Say what compiling has cost; after the first call it was a request outside the compiled range."""
        sizes = {name: list(tensor.shape) for name, tensor in inputs.items() if "cache" not in name}
        first = self._first_compilation_seconds == 0.0
        self._first_compilation_seconds = self._first_compilation_seconds or seconds
        logger.log(
            logging.INFO if first else logging.WARNING,
            "%s: %s; compiled %d regions in %.1f s. Later calls of this kind reuse them. Sizes: %s",
            self.name,
            "first call" if first else "a call outside what was compiled so far",
            compilations,
            seconds,
            sizes,
        )


def lower(
    program: ExportedProgram, backend: str = "inductor", dynamic: bool = True, name: str = "program"
) -> Executable:
    """Lower a program.

    Args:
        program: as `reroute_fx.route` returns it; its regions are the graph's ``meta["region"]``.
        backend: ``"inductor"`` compiles each distinct region at its first call; ``"eager"`` runs the graph
            as it is.
        dynamic: compile for any batch size and length; otherwise for those of the first call, and again
            when they change.
        name: what the program is for, in messages.

    Raises:
        ConfigError: unknown backend.
    """
    check_backend(backend)
    counter: Counter[str] = Counter()
    if backend == "eager":
        return Executable(program, backend, program.graph_module, name, counter)
    regions = inductor.lower(program.graph_module, dynamic, counter)
    executable = Executable(program, backend, regions.module, name, counter)
    executable.regions, executable.distinct_regions = regions.calls, regions.distinct
    return executable


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ConfigError(f"backend is {backend!r}; expected one of {list(BACKENDS)}.")
