"""The `tensorrt` backend: a routed program through `torch_tensorrt.dynamo` into TensorRT engines.

An engine holds its weights and serves sizes up to limits that are known when it is built. Operators that can't be
converted run in PyTorch between engines; `coverage` lists them beforehand.
"""

import importlib
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, OutputKind, OutputSpec

from ...config.limits import Limits
from ...errors import ArtifactError, BackendUnavailableError
from ...passes.tensor_names import INPUTS_EMBEDS, VISUAL_INDEX, is_cache_input
from ..call_schedule import as_executable, by_name
from ..device import program_device
from .decompositions import Size, decompose, rebuild
from .engine_coverage import Coverage, coverage, coverage_of

__all__ = [
    "Coverage",
    "TensorRTProgram",
    "check_tensorrt",
    "coverage",
    "coverage_of",
    "decompose",
    "load_tensorrt",
    "lower_tensorrt",
    "save_tensorrt",
]

_NOTE = "reroute_fx.json"
"""File beside the engines that says what goes in and comes out."""
_USUAL_LENGTH, _USUAL_ROWS, _USUAL_NEW_TOKENS = 1024, 2, 2
EXPERIMENTAL = (
    "The tensorrt backend is experimental: what Torch-TensorRT is given was checked without it, but no engine of it "
    "has been built and run on a GPU yet. Compare its answers with those of backend 'inductor' before you rely on them."
)


@dataclass(frozen=True)
class Interface:
    """What goes into a compiled program and what comes out.

    Attributes:
        inputs: names, in order.
        written: inputs that the program returns anew, before all else.
        outputs: names of what else it returns.
    """

    inputs: tuple[str, ...]
    written: tuple[str, ...]
    outputs: tuple[str, ...]


class TensorRTProgram:
    """A program on TensorRT engines, called as an `Executable` is.

    Attributes:
        name: what the program is for, in messages.
        interface: what goes in and comes out.
        program: what was compiled; None for what was loaded.
        compilations: how often it was compiled here.
        compile_seconds: seconds that took.
    """

    backend = "tensorrt"
    cuda_graphs = None

    def __init__(
        self,
        run: Callable[..., Any],
        interface: Interface,
        name: str,
        program: ExportedProgram | None = None,
        seconds: float = 0.0,
    ) -> None:
        self.name, self.interface = name, interface
        self.program: Any = program
        self.compilations, self.compile_seconds = int(program is not None), seconds
        self._run = run

    def __call__(self, **inputs: torch.Tensor) -> dict[str, Any]:
        """Run on contiguous inputs; returns what an `Executable` of the program returns."""
        return as_executable(self.run(**inputs))

    @torch.no_grad()
    def run(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run on contiguous inputs; returns the outputs by name."""
        results = pytree.tree_leaves(self._run(**{name: inputs[name] for name in self.interface.inputs}))
        count = len(self.interface.written)
        for name, new in zip(self.interface.written, results[:count], strict=True):
            inputs[name].copy_(new)
        return dict(zip(self.interface.outputs, results[count:], strict=True))


def lower_tensorrt(
    program: ExportedProgram, name: str = "program", limits: Limits | None = None
) -> TensorRTProgram:
    """Compile a program into TensorRT engines; float32 stays float32.

    Args:
        program: as `route` or `continuation` returns it, on a CUDA device. It is not changed.
        name: what the program is for, in messages.
        limits: the largest call.

    Raises:
        BackendUnavailableError: Torch-TensorRT can't be imported, or the program is on no CUDA device.
        CaptureError: a size was fixed.
    """
    device = program_device(program)
    torch_tensorrt = check_tensorrt(device)
    start = time.perf_counter()
    sizes = _sizes(program, limits or Limits())
    pure, interface = _pure(decompose(program, sizes))
    run = torch_tensorrt.dynamo.compile(
        pure,
        arg_inputs=(),
        kwarg_inputs=_inputs(pure, torch_tensorrt.Input),
        device=device,
        disable_tf32=True,
        min_block_size=1,
        # New tokens attend to a cache by a mask that is not the plain causal one.
        attn_bias_is_causal=False,
    )
    return TensorRTProgram(run, interface, name, program, time.perf_counter() - start)


def check_tensorrt(device: torch.device) -> Any:
    """The module `torch_tensorrt`, ready to compile for `device`.

    Warns, once in a process, that the backend is experimental.

    Raises:
        BackendUnavailableError: it can't be imported, or `device` is no CUDA device.
    """
    try:
        torch_tensorrt = importlib.import_module("torch_tensorrt")
    except Exception as error:  # The library raises a plain Exception when its native part is missing.
        missing = "is not installed" if getattr(error, "name", "") == "torch_tensorrt" else "can't be loaded"
        raise BackendUnavailableError(
            f"backend is 'tensorrt', but torch_tensorrt {missing} ({type(error).__name__}: {error}); expected "
            f"Torch-TensorRT and TensorRT for torch {torch.__version__}. Run pip install 'reroute-fx[tensorrt]'."
        ) from error
    if device.type != "cuda" or not torch.cuda.is_available():
        raise BackendUnavailableError(
            f"backend is 'tensorrt', but the model is on {device}; expected a CUDA device, on which TensorRT builds "
            f"and runs its engines. Call model.to('cuda') on a machine with an NVIDIA GPU, or use another backend."
        )
    # Shown once by default, as it always comes from this line.
    warnings.warn(EXPERIMENTAL, UserWarning, stacklevel=1)
    return torch_tensorrt


def save_tensorrt(program: TensorRTProgram, path: Path) -> None:
    """Write a program that `lower_tensorrt` made. Engines run on the kind of GPU that they were built on.

    Raises:
        BackendUnavailableError: Torch-TensorRT can't be imported, or there is no CUDA device.
    """
    torch_tensorrt = check_tensorrt(torch.device("cuda"))
    note = {"name": program.name, **asdict(program.interface)}
    torch_tensorrt.save(
        program._run,
        str(path),
        output_format="exported_program",
        extra_files={_NOTE: json.dumps(note)},
        # Traced again the program would need example inputs, and its symbolic sizes new bounds.
        retrace=False,
        pickle_protocol=4,
    )


def load_tensorrt(path: Path) -> TensorRTProgram:
    """Read a program that `save_tensorrt` wrote.

    Raises:
        BackendUnavailableError: Torch-TensorRT can't be imported, or there is no CUDA device.
        ArtifactError: the file is not there, or `save_tensorrt` did not write it.
    """
    torch_tensorrt = check_tensorrt(torch.device("cuda"))
    if not path.is_file():
        raise ArtifactError(
            f"{path} is no file; expected a program that save_tensorrt wrote. Export it again."
        )
    files = {_NOTE: ""}
    try:
        loaded = torch_tensorrt.load(str(path), extra_files=files)
        note = json.loads(files[_NOTE])
        interface = Interface(*(tuple(note[field]) for field in ("inputs", "written", "outputs")))
        name = str(note["name"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path} can't be read ({type(error).__name__}: {error}); expected a program that save_tensorrt wrote, and "
            f"what it takes and returns. Export it again."
        ) from error
    return TensorRTProgram(loaded.module(), interface, name)


def _user_inputs(program: ExportedProgram) -> dict[str, Any]:
    """Values of the inputs that a caller gives, by name."""
    given = {
        s.arg.name for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT and s.arg
    }
    nodes = program.graph.find_nodes(op="placeholder")
    return {node.name: node.meta["val"] for node in nodes if node.name in given}


def _sizes(program: ExportedProgram, limits: Limits) -> dict[tuple[str, int], Size]:
    """What the dimensions of a program's inputs may be. No two lengths are usually the same."""
    inputs = _user_inputs(program)
    rows = inputs[INPUTS_EMBEDS].shape[0]
    new_tokens_only = any(map(is_cache_input, inputs))
    sizes = {}
    for number, (name, fake) in enumerate(inputs.items()):
        for dim, size in enumerate(fake.shape):
            if isinstance(size, int):
                continue
            if str(size) == str(rows):
                sizes[name, dim] = _size(_USUAL_ROWS, limits.batch)
            elif name == INPUTS_EMBEDS and new_tokens_only:
                sizes[name, dim] = _size(_USUAL_NEW_TOKENS, limits.length)
            elif name == VISUAL_INDEX:
                sizes[name, dim] = _size(min(limits.image_tokens, _USUAL_LENGTH) - 1, limits.length)
            else:
                sizes[name, dim] = _size(min(limits.length, _USUAL_LENGTH) - number, limits.length)
    return sizes


def _size(usual: int, most: int) -> Size:
    return Size(max(2, min(usual, most)), most)


def _pure(program: ExportedProgram) -> tuple[ExportedProgram, Interface]:
    """A decomposed program that returns what it wrote into its inputs, all in one flat tuple.

    Torch-TensorRT removes calls whose result nobody reads, and with them writes into inputs.
    """
    signature, spec = program.graph_signature, program.call_spec.out_spec
    kinds = {OutputKind.USER_INPUT_MUTATION, OutputKind.USER_OUTPUT}
    assert spec is not None
    assert {output.kind for output in signature.output_specs} <= kinds
    flat = [OutputSpec(OutputKind.USER_OUTPUT, output.arg, None) for output in signature.output_specs]
    entry = program.module_call_graph[0]
    assert entry.signature is not None
    call = replace(entry.signature, out_spec=pytree.tree_structure(tuple(flat)))
    pure = rebuild(
        program,
        program.graph,
        graph_signature=ExportGraphSignature(signature.input_specs, flat),
        module_call_graph=[replace(entry, signature=call)],
    )
    written = [str(o.target) for o in signature.output_specs if o.kind is OutputKind.USER_INPUT_MUTATION]
    return pure, Interface(tuple(_user_inputs(program)), tuple(written), _output_names(spec))


def _output_names(spec: pytree.TreeSpec) -> tuple[str, ...]:
    numbers: dict[str, int] = by_name(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))
    return tuple(sorted(numbers, key=numbers.__getitem__))


def _inputs(program: ExportedProgram, make: Callable[..., Any]) -> dict[str, Any]:
    """A `torch_tensorrt.Input` for each input, with the ranges of its sizes."""
    ranges = program.range_constraints
    return {name: _input(name, fake, ranges, make) for name, fake in _user_inputs(program).items()}


def _input(name: str, fake: torch.Tensor, ranges: Mapping[Any, Any], make: Callable[..., Any]) -> Any:
    if all(isinstance(size, int) for size in fake.shape):
        return make(shape=tuple(fake.shape), dtype=fake.dtype, name=name)

    def shape(bound: Callable[[torch.SymInt], int]) -> tuple[int, ...]:
        sizes: Sequence[Any] = fake.shape
        return tuple(size if isinstance(size, int) else bound(size) for size in sizes)

    return make(
        min_shape=shape(lambda size: 1),
        opt_shape=shape(lambda size: int(size.node.hint)),
        max_shape=shape(lambda size: int(ranges[size.node.expr].upper)),
        dtype=fake.dtype,
        name=name,
    )
