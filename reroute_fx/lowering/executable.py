"""A lowered program that is called with its inputs by name."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from rich.console import Console
from rich.progress import Progress
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from ..common.turns import one_at_a_time
from ..config.limits import Limits
from ..errors import ConfigError
from .cuda_graphs import CudaGraphs, Recorder, Role
from .device import on_device, program_device
from .inductor import compiled_regions
from .tensorrt.engines import TensorRTProgram, lower_tensorrt

BACKENDS = ("inductor", "eager", "tensorrt")
logger = logging.getLogger(__name__)


class Executable:
    """Runs the graph of an exported program on the program's own parameters.

    Attributes:
        program: what was lowered.
        name: what the program is for, in messages.
        backend: name of the backend.
        regions: calls of compiled regions in one run; 0 on `eager`.
        distinct_regions: functions that are compiled for them.
        attention: kernels of attention that were chosen for a GPU; empty where PyTorch chooses.
        cuda_graphs: replays calls of kinds that came before; None if every call is launched anew.
        show_progress: whether the first call shows on the terminal what is being compiled.
    """

    def __init__(self, program: ExportedProgram, backend: str, name: str) -> None:
        self.program = program
        self.name = name
        self.backend = backend
        self.regions = 0
        self.distinct_regions = 0
        self.attention: tuple[str, ...] = ()
        self.cuda_graphs: CudaGraphs | None = None
        self.show_progress = False
        self._compiled = compiled_regions.Compilations()
        self._has_run = False
        self._module = program.graph_module
        self._device = program_device(program)
        state = {**program.state_dict, **program.constants}
        specs = program.graph_signature.input_specs
        self._weights = [None if s.kind is InputKind.USER_INPUT else state[s.target] for s in specs]
        self._places = [(i, s.arg.name) for i, s in enumerate(specs) if s.kind is InputKind.USER_INPUT]
        self._out_spec = program.call_spec.out_spec

    @property
    def compilations(self) -> int:
        """How often its calls compiled a region so far; calls of other programs may have done so before."""
        return self._compiled.regions

    @property
    def compile_seconds(self) -> float:
        """Seconds that the compiler has taken so far."""
        return self._compiled.seconds

    @one_at_a_time
    @torch.no_grad()
    def __call__(self, **inputs: torch.Tensor) -> Any:
        """Run on contiguous inputs; returns what the program returns."""
        flat: list[Any] = list(self._weights)
        for place, name in self._places:
            flat[place] = inputs[name]
        before, start = self.compilations, time.perf_counter()
        with self._compiled.counted(), self._progress(), on_device(self._device):
            result = pytree.tree_unflatten((self.cuda_graphs or self._module)(*flat), self._out_spec)
        if self.compilations > before:
            self._tell(self.compilations - before, time.perf_counter() - start, inputs)
        self._has_run = True
        return result

    @contextmanager
    def _progress(self) -> Iterator[None]:
        """A bar that counts the regions of a first call."""
        if not self.show_progress or not self.distinct_regions or self._has_run:
            yield
            return
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(f"compiling {self.name}", total=self.distinct_regions)
            self._compiled.on_region = lambda: bar.advance(task)
            try:
                yield
            finally:
                self._compiled.on_region = None

    def _record_graphs(self, program: ExportedProgram, recorder: Recorder) -> None:
        written = written_inputs(program)
        roles: list[Role] = ["parameter"] * len(self._weights)
        for place, name in self._places:
            roles[place] = "cache" if name in written else "input"
        self.cuda_graphs = CudaGraphs(self._module, roles, recorder)

    def _tell(self, compilations: int, seconds: float, inputs: dict[str, torch.Tensor]) -> None:
        """Say what compiling has cost; after the first call it was a request outside the compiled range."""
        sizes = {name: list(tensor.shape) for name, tensor in inputs.items() if "cache" not in name}
        logger.log(
            logging.WARNING if self._has_run else logging.INFO,
            "%s: %s; compiled %d regions in %.1f s. Later calls of this kind reuse them. Sizes: %s",
            self.name,
            "a call outside what was compiled so far" if self._has_run else "first call",
            compilations,
            seconds,
            sizes,
        )


def lower(
    program: ExportedProgram,
    backend: str = "inductor",
    dynamic: bool = True,
    name: str = "program",
    *,
    recorder: Recorder | None = None,
    show_progress: bool = False,
    limits: Limits | None = None,
) -> Executable | TensorRTProgram:
    """Lower a program.

    Args:
        program: as `reroute_fx.route` returns it; its regions are the graph's ``meta["region"]``.
        backend: ``"inductor"`` compiles each distinct region at its first call; ``"eager"`` runs the graph
            as it is; ``"tensorrt"`` builds engines now.
        dynamic: compile for any batch size and length; otherwise for those of the first call, and again
            when they change.
        name: what the program is for, in messages.
        recorder: records calls as CUDA graphs; None to launch every call anew.
        show_progress: show what the first call compiles.
        limits: the largest call, for ``"tensorrt"``.

    Raises:
        ConfigError: unknown backend.
        BackendUnavailableError: Torch-TensorRT can't be imported, or the program is on no CUDA device.
    """
    check_backend(backend)
    if backend == "tensorrt":
        return lower_tensorrt(program, name, limits)
    executable = Executable(program, backend, name)
    if backend == "inductor":
        regions, executable.attention = compiled_regions.lower(
            program.graph_module, executable._device, dynamic
        )
        executable._module = regions.module
        executable.regions, executable.distinct_regions = regions.calls, len(regions.compiled)
        executable.show_progress = show_progress
    if recorder is not None:
        executable._record_graphs(program, recorder)
    return executable


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ConfigError(f"backend is {backend!r}; expected one of {list(BACKENDS)}.")


def written_inputs(program: ExportedProgram) -> set[str]:
    """Names of the inputs that a program writes into."""
    calls = (n for n in program.graph.nodes if n.op == "call_function")
    schemas = ((n, getattr(n.target, "_schema", None)) for n in calls)
    return {
        given.name
        for node, schema in schemas
        if schema is not None and schema.is_mutable
        for given, argument in zip(node.args, schema.arguments, strict=False)
        if argument.is_write and isinstance(given, fx.Node) and given.op == "placeholder"
    }
