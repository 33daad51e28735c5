"""Routed programs as ONNX files that TensorRT can import, and ONNX Runtime to run them.

All programs refer to one file of weights. What writes into its inputs in PyTorch returns them anew here:
``key_cache_7`` comes back as ``key_cache_7.new``.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch.export import Dim, ExportedProgram

from ..._compat import unequal_sizes
from ...errors import BackendUnavailableError, CaptureError, first_line
from ..call_schedule import as_executable, by_name
from ..example_sizes import ExampleSizes
from ..executable import written_inputs
from ..implementations import use_implementations
from ..selection_by_counting import select_tokens_by_counting
from ..weights import WEIGHTS, memory_of, save_weights
from .onnx_operators import (
    check_operators,
    library,
    nodes,
    operator_name,
    translations,
)
from .softcap_of_each_head import attention_with_softcap_of_each_head

_SPELLED: dict[Any, Any] = {
    torch.ops.reroute.select_tokens.default: select_tokens_by_counting,
    torch.ops.reroute.attention_with_softcap.default: attention_with_softcap_of_each_head,
}
"""What stands for operators of which the reference is nothing for ONNX or TensorRT."""
OPSET = 18
"""TensorRT's importer takes 9 to 24."""
_PREFIX = "program."
"""Of the names that `_Functional` gives to weights."""
NEW = ".new"
"""Ends the name of an output that replaces the input of that name."""


def write_onnx(programs: Mapping[str, ExportedProgram], folder: Path) -> dict[str, Path]:
    """Write programs that `route` or `continuation` returned, or that return tensors by name, to ``<name>.onnx``.

    Args:
        programs: by name. They are not changed.
        folder: exists. All programs share ``weights.safetensors`` in it, with the names that the weights have in
            the programs.

    Returns:
        The files of the programs. Inputs are named and sized as in the program; outputs are
        ``last_hidden_state``, what the program routes, and ``<name>.new`` for each input that it writes into.

    Raises:
        BackendUnavailableError: a library is missing.
        CaptureError: a program can't be converted, was fixed to a size, or uses an operator that TensorRT's
            importer does not take. Nothing was written.
    """
    check_libraries()
    ir = library("onnx_ir")
    models = {name: _convert(program, name) for name, program in programs.items()}
    for name, model in models.items():
        check_operators(model, name)
    _write_weights(models, folder)
    paths = {name: folder / f"{name}.onnx" for name in models}
    for name, path in paths.items():
        ir.save(models[name], path)
    return paths


def check_libraries() -> None:
    """Raise BackendUnavailableError unless the libraries that write ONNX files are installed."""
    for name in ("onnx", "onnx_ir", "onnxscript"):
        library(name)


def operators(path: Path) -> set[str]:
    """Names of the operators in an ONNX file, those of other domains as ``domain::name``."""
    ir = library("onnx_ir")
    return {operator_name(node) for node in nodes(ir.load(path))}


class OnnxProgram:
    """Runs a file that `write_onnx` wrote, with ONNX Runtime on CPU.

    Args:
        path: the file; what it refers to lies beside it.

    Raises:
        BackendUnavailableError: ONNX Runtime is missing, or lacks an operator on a type of the program.
    """

    def __init__(self, path: Path) -> None:
        runtime = library("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except runtime.capi.onnxruntime_pybind11_state.NotImplemented as error:
            raise BackendUnavailableError(
                f"ONNX Runtime {runtime.__version__} can't run {path} on CPU: {error}. Write the program of a "
                f"float32 model; TensorRT can import this one."
            ) from error
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def __call__(self, **inputs: torch.Tensor) -> dict[str, Any]:
        """Run a routed program; returns what an `Executable` of it returns."""
        return as_executable(self.run(**inputs))

    @torch.no_grad()
    def run(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run on CPU tensors; returns the outputs by name. Caches that the program updates are written into."""
        given = {name: inputs[name].detach().numpy() for name in self.inputs}
        results = zip(self.outputs, self.session.run(self.outputs, given), strict=True)
        values = {name: torch.from_numpy(result) for name, result in results}
        for name in (name for name in self.outputs if name.endswith(NEW)):
            inputs[name.removesuffix(NEW)].copy_(values.pop(name))
        return values


def _convert(program: ExportedProgram, name: str) -> Any:
    """The program as an `onnx_ir.Model` on the program's own weights."""
    exported = _export(program, name)
    results = exported.call_spec.out_spec
    try:
        converted: Any = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=OPSET,
            input_names=program.graph_signature.user_inputs,
            output_names=list(pytree.tree_unflatten(range(results.num_leaves), results)),
            custom_translation_table=translations(),
            optimize=False,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        # The exporter's own error is a page on how to report it.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise CaptureError(
            f"The program {name!r} can't be written as ONNX: {first_line(cause)}. Use format='aot'."
        ) from error
    _simplify(converted.model)
    return converted.model


class _Functional(torch.nn.Module):
    """A program that returns the inputs that it writes into instead, and all its results by name."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        self.program = program.module(check_guards=False)
        for operator, spelled in _SPELLED.items():
            for node in self.program.graph.find_nodes(op="call_function", target=operator):
                node.target = spelled
        # The other references on every device: ONNX has no place for kernels.
        use_implementations(self.program, torch.device("cpu"))
        written = written_inputs(program)
        self.written = [name for name in program.graph_signature.user_inputs if name in written]

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        new = {name: inputs[name].clone() for name in self.written}
        results = by_name(self.program(**{**inputs, **new}))
        return results | {name + NEW: tensor for name, tensor in new.items()}


def _export(program: ExportedProgram, name: str) -> ExportedProgram:
    """The functional program in ATen operators, for any sizes for which the program is."""
    inputs, shapes = _examples(program)
    try:
        with torch.no_grad(), unequal_sizes():
            return torch.export.export(
                _Functional(program), (inputs,), dynamic_shapes=(shapes,), strict=False
            )
    except torch._dynamo.exc.UserError as error:
        raise CaptureError(
            f"The program {name!r} was fixed to a size where it should take any. This is a bug of reroute_fx or of "
            f"torch {torch.__version__}; please report it. {error}"
        ) from error


def _examples(program: ExportedProgram) -> tuple[dict[str, torch.Tensor], dict[str, dict[int, Any]]]:
    """Inputs of a program, and which of their dimensions are symbols; equal ones are one `Dim`."""
    placeholders = {n.name: n.meta["val"] for n in program.graph.find_nodes(op="placeholder")}
    shapes = {
        name: {
            i: size.node.expr for i, size in enumerate(placeholders[name].shape) if not isinstance(size, int)
        }
        for name in program.graph_signature.user_inputs
    }
    symbols = {symbol for shape in shapes.values() for size in shape.values() for symbol in size.free_symbols}
    dims = {symbol: Dim(str(symbol), min=_least(program, symbol)) for symbol in symbols}
    example_size, inputs = ExampleSizes(), {}
    for name in shapes:
        fake = placeholders[name]
        inputs[name] = torch.zeros(
            [example_size(size) for size in fake.shape], dtype=fake.dtype, device=fake.device
        )
    return inputs, {name: {i: _multiple(s, dims) for i, s in shape.items()} for name, shape in shapes.items()}


def _least(program: ExportedProgram, symbol: sympy.Symbol) -> int:
    """The smallest size for which a program is made."""
    bounds = program.range_constraints.get(symbol)
    return 0 if bounds is None else int(bounds.lower)


def _multiple(size: sympy.Expr, dims: Mapping[sympy.Symbol, Any]) -> Any:
    """A size that is a symbol or a multiple of one, as a `Dim`."""
    factor, symbol = size.as_coeff_Mul()
    return dims[symbol] if factor == 1 else int(factor) * dims[symbol]


def _simplify(model: Any) -> None:
    """Fold what is constant and drop what is unused. Weights stay as they are, so that programs can share them."""
    optimizer = library("onnxscript.optimizer")
    passes = library("onnx_ir.passes.common")
    weights = {id(value) for value in model.graph.initializers.values()}
    optimizer.fold_constants(
        model,
        onnx_shape_inference=True,
        should_fold=lambda node: False if any(id(v) in weights for v in node.inputs) else None,
    )
    for step in (
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        # The metadata are stack traces, with the paths of this machine.
        passes.ClearMetadataAndDocStringPass(),
    ):
        step(model)


def _write_weights(models: Mapping[str, Any], folder: Path) -> None:
    """Write the weights of all models, each once, and let the models refer to the file."""
    tensors: dict[str, torch.Tensor] = {}
    names: dict[Any, str] = {}
    references = []
    for model_name, model in models.items():
        for value in _weights(model):
            value.name = value.name.removeprefix(_PREFIX)
            tensor = value.const_value.raw.detach()
            place = memory_of(tensor)
            if place not in names:
                names[place] = f"{model_name}.{value.name}" if value.name in tensors else value.name
                tensors[names[place]] = tensor
            references.append((value, names[place]))
    save_weights(tensors, folder / WEIGHTS)
    places = _places(folder / WEIGHTS)
    for value, name in references:
        _refer(value, *places[name], folder)


def _weights(model: Any) -> list[Any]:
    """The values that stand for a parameter or buffer; other constants are small and stay in the model."""
    values = list(model.graph.initializers.values())
    return [value for value in values if isinstance(value.const_value.raw, torch.Tensor)]


def _places(path: Path) -> dict[str, tuple[int, int]]:
    """For each tensor of a safetensors file the byte at which it starts, and its number of bytes."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    bounds = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: (8 + size + start, end - start) for name, (start, end) in bounds.items()}


def _refer(value: Any, start: int, size: int, folder: Path) -> None:
    """Let a constant of a model be `size` bytes of the file of weights."""
    ir = library("onnx_ir")
    value.const_value = ir.ExternalTensor(
        WEIGHTS, start, size, value.dtype, shape=value.shape, name=value.name, base_dir=folder
    )
