"""Which ONNX operators TensorRT's importer takes, as data, and what stands for those that it does not take."""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from typing import Any

import torch

from ...common.optional_libraries import optional_library
from ...errors import CaptureError

_TYPES = {"FLOAT": "FP32", "FLOAT16": "FP16", "BFLOAT16": "BF16", "FLOAT8E4M3FN": "FP8", "FLOAT4E2M1": "FP4"}
"""What the list calls a type of ONNX, where it has another name for it."""


def library(name: str) -> Any:
    """Import a library of the extra `onnx`.

    Raises:
        BackendUnavailableError: it is not installed.
    """
    return optional_library(name, "onnx", "for ONNX files")


@functools.cache
def supported_operators() -> dict[str, dict[str, Any]]:
    """What the importer says of each operator: ``supported``, and where it is, ``types``, ``restriction`` and
    ``constant_inputs``, the numbers of the inputs that must not be computed.
    """
    data = files(__package__) / "data" / "tensorrt_onnx_operators.json"
    operators: dict[str, dict[str, Any]] = json.loads(data.read_text())["operators"]
    return operators


def nodes(model: Any) -> Iterator[Any]:
    """All nodes of an `onnx_ir.Model`, those of inner graphs and of functions included."""
    for graph in (model.graph, *model.functions.values()):
        yield from graph.all_nodes()


def operator_name(node: Any) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else str(node.op_type)


def check_operators(model: Any, name: str) -> None:
    """Check an `onnx_ir.Model`.

    Args:
        model: of the opset whose operators are checked.
        name: of the program, in messages.

    Raises:
        CaptureError: an operator, or the type that it is used with, is not in the list.
    """
    found = [f"{what} at {node.name}" for node in nodes(model) for what in _objections(node, model)]
    if found:
        others = f" and {len(found) - 8} more" if len(found) > 8 else ""
        raise CaptureError(
            f"The program {name!r} uses what TensorRT's ONNX importer does not take: {', '.join(found[:8])}{others}; "
            f"expected operators and types of its list. Use the eager or inductor backend for this model."
        )


def _objections(node: Any, model: Any) -> Iterator[str]:
    operator = operator_name(node)
    rules = supported_operators().get(operator, {"supported": False})
    if not rules["supported"]:
        yield operator
        return
    wrong = {_type(value) for value in _typed_values(node, model) if value.dtype} - {*rules["types"]}
    yield from (f"{operator} on {type_name}" for type_name in sorted(wrong))
    for i in rules.get("constant_inputs", ()):
        if i < len(node.inputs) and node.inputs[i] is not None and node.inputs[i].const_value is None:
            yield f"{operator} with a computed input {i}"


def _typed_values(node: Any, model: Any) -> Iterator[Any]:
    """The values that an operator works on; indices, shapes and conditions have a type of their own."""
    schema = library("onnx").defs.get_schema(node.op_type, model.opset_imports[node.domain], node.domain)
    for values, parameters in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        for i, value in enumerate(values):
            # The last parameter may stand for several values.
            if value is not None and parameters[min(i, len(parameters) - 1)].type_str == "T":
                yield value


def _type(value: Any) -> str:
    name: str = value.dtype.name
    return _TYPES.get(name, name)


def _clamp(value: Any, min: Any = None, max: Any = None) -> Any:
    """``aten.clamp``; TensorRT's Clip takes floating point only."""
    op = library("onnxscript").opset18
    if min is not None:
        value = op.Max(value, op.CastLike(min, value))
    if max is not None:
        value = op.Min(value, op.CastLike(max, value))
    return value


def _cumulative_sum(value: Any, dim: int, dtype: Any = None) -> Any:
    """``aten.cumsum`` of numbers and of booleans, which it counts; TensorRT's CumSum takes floating point only.

    float32 counts exactly up to 16 million.
    """
    op, types = library("onnxscript").opset18, library("onnx_ir").DataType
    if value.dtype.is_floating_point():
        return op.CumSum(value, op.Constant(value_int=dim))
    counts = op.CumSum(op.Cast(value, to=types.FLOAT), op.Constant(value_int=dim))
    return op.Cast(counts, to=types.INT64)


def _convolution_3d(
    value: Any,
    weight: Any,
    bias: Any = None,
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
) -> Any:
    """``aten.conv3d``; onnxscript 0.7 puts zeros of a wrong shape in the place of a missing bias."""
    op = library("onnxscript").opset18
    given = (value, weight) if bias is None else (value, weight, bias)
    pads = [*padding, *padding]
    return op.Conv(*given, strides=list(stride), pads=pads, dilations=list(dilation), group=groups)


def _floor_divide(value: Any, other: Any) -> Any:
    """``aten.floor_divide``; onnxscript 0.7 compares booleans, which TensorRT's Equal does not take."""
    op = library("onnxscript").opset18
    other = op.CastLike(other, value)
    quotient = op.Div(value, other)
    if value.dtype.is_floating_point():
        return op.Floor(quotient)
    zero = op.CastLike(op.Constant(value_int=0), value)
    rest = op.Sub(value, op.Mul(quotient, other))
    is_above = op.And(op.Not(op.Equal(rest, zero)), op.Xor(op.Less(rest, zero), op.Less(other, zero)))
    return op.Sub(quotient, op.CastLike(is_above, value))


def _grouped_product(rows: Any, weight: Any, ends: Any) -> Any:
    """``transformers.grouped_mm_fallback``: rows ``[S, d]`` in the order of their experts, which end at ``ends [E]``.

    Every expert ``[E, d, f]`` runs on all rows, and of its products those of its own are taken: shapes that depend on
    values are nothing that TensorRT takes.
    """
    op, types = library("onnxscript").opset18, library("onnx_ir").DataType
    first, second, zero, one = op.Constant(value_ints=[0]), op.Constant(value_ints=[1]), *_integers(0, 1)
    row = op.Unsqueeze(
        op.Range(zero, op.Squeeze(op.Shape(rows, start=0, end=1), first), one), first
    )  # [1, S]
    ends = op.Unsqueeze(op.Cast(ends, to=types.INT64), second)  # [E, 1]
    expert = op.ReduceSum(
        op.Cast(op.GreaterOrEqual(row, ends), to=types.INT64), first
    )  # [1, S], those that ended
    number = op.Unsqueeze(op.Range(zero, op.Squeeze(op.Shape(ends, start=0, end=1), first), one), second)
    is_own = op.Unsqueeze(op.Equal(number, expert), op.Constant(value_ints=[2]))  # [E, S, 1]
    products = op.MatMul(op.Unsqueeze(rows, first), weight)  # [E, S, f]
    nothing = op.CastLike(op.Constant(value_float=0.0), products)
    return op.ReduceSum(op.Where(is_own, products, nothing), first, keepdims=0)


def _integers(*values: int) -> list[Any]:
    return [library("onnxscript").opset18.Constant(value_int=value) for value in values]


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What stands for operators of PyTorch that onnxscript has no function for, or one that TensorRT does not take."""
    found = dict(TRANSLATIONS)
    # Transformers registers it with the first model that has experts.
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        found[torch.ops.transformers.grouped_mm_fallback.default] = _grouped_product
    return found


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.clamp.default: _clamp,
    torch.ops.aten.conv3d.default: _convolution_3d,
    torch.ops.aten.cumsum.default: _cumulative_sum,
    torch.ops.aten.floor_divide.default: _floor_divide,
}
"""Functions of onnxscript for ATen operators."""
