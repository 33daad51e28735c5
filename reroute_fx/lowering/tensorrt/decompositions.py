"""A routed program in operators that Torch-TensorRT converts, with every size still symbolic.

Torch-TensorRT 2.13 has no converter for a stable sort, sorts and gathers along fixed sizes only, and sums up as
floating point numbers in a loop. So the `reroute::` operators, and the few others of that kind that the passes emit,
are written with comparisons, sums, indexing and scatters. They compute what their references in `kernels` compute.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import fx
from torch._decomp import get_decompositions
from torch._dynamo.source import ConstantSource
from torch._export.utils import _collect_all_valid_cia_ops_for_aten_namespace, _get_decomp_for_cia
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from ... import kernels
from ...errors import CaptureError
from ..selection_by_counting import count_before, row_numbers, select_tokens_by_counting

aten, reroute = torch.ops.aten, torch.ops.reroute
Operator = Any
"""An overload of an operator."""


@dataclass(frozen=True)
class Size:
    """What a symbolic size may be.

    Attributes:
        usual: what TensorRT tunes for, at least 2.
        most: its upper bound, None for none. A size of at most 1 is fixed.
    """

    usual: int
    most: int | None = None


def decompose(
    program: ExportedProgram, sizes: Mapping[tuple[str, int], Size] | None = None
) -> ExportedProgram:
    """The program as `torch_tensorrt.dynamo` sees it right before conversion.

    Args:
        program: as `route` or `continuation` returns it. It is not changed, and its parameters are shared.
        sizes: what the dimensions of inputs may be, by name and dimension.

    Returns:
        A program of the same inputs and outputs without `reroute::` operators and without in-place ones: caches that
        the program writes into come out as mutated inputs of its signature. Its symbolic sizes are its own. Nodes keep
        ``meta["region"]``.

    Raises:
        CaptureError: a size was fixed.
    """
    copied = _with_own_sizes(program, sizes or {})
    decomposed: ExportedProgram
    with torch.no_grad():
        decomposed = copied.run_decompositions(_decompositions())
    _check_sizes(copied, decomposed)
    for node in decomposed.graph.nodes:
        region = node.meta.get("custom", {}).get("region")
        if region is not None:
            node.meta["region"] = region
    return decomposed


def _with_own_sizes(program: ExportedProgram, sizes: Mapping[tuple[str, int], Size]) -> ExportedProgram:
    """A copy whose symbolic sizes are its own: what is traced leaves its mark on them.

    Its nodes have no values but the inputs, and their region where `run_decompositions` hands it on.
    """
    graph = fx.Graph()
    output = graph.output(graph.graph_copy(program.graph, {}))  # type: ignore[arg-type]
    output.meta = dict(program.graph.output_node().meta)
    _write_out_of_place(graph)
    for node in graph.nodes:
        node.meta["custom"] = {**node.meta.get("custom", {}), "region": node.meta.get("region")}
        if node.op == "call_function":
            node.meta["val"] = None
    symbols = _Symbols(sizes)
    for node in graph.find_nodes(op="placeholder"):
        node.meta["val"] = symbols.like(node.name, node.meta["val"])
    return rebuild(program, graph, range_constraints=symbols.ranges())


def _write_out_of_place(graph: fx.Graph) -> None:
    """Replace a custom operator that torch can't make functional by itself.

    Before: ``reroute.restore_tokens_(%stream, %rows, %positions)``, later readers of %stream
    After:  ``%new = reroute.restore_tokens(%stream, %rows, %positions)``, later readers of %new
    """
    for node in graph.find_nodes(op="call_function", target=reroute.restore_tokens_.default):
        stream: Any = node.args[0]
        node.target = reroute.restore_tokens.default
        stream.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: user > node)


def rebuild(program: ExportedProgram, graph: fx.Graph, **changed: Any) -> ExportedProgram:
    """`program` with another graph, and with whatever else of its constructor is `changed`."""
    given: dict[str, Any] = {
        "graph_signature": program.graph_signature,
        "state_dict": program.state_dict,
        "range_constraints": dict(program.range_constraints),
        "module_call_graph": program.module_call_graph,
        "constants": program.constants,
        "verifiers": program.verifiers,
    }
    return ExportedProgram(root=fx.GraphModule({}, graph), graph=graph, **(given | changed))


class _Symbols:
    """New symbolic sizes, one for each of a program."""

    def __init__(self, sizes: Mapping[tuple[str, int], Size]) -> None:
        self.given = sizes
        self.environment = ShapeEnv()
        self.fake_mode = FakeTensorMode(shape_env=self.environment)
        self.new: dict[Any, torch.SymInt] = {}

    def like(self, name: str, fake: Any) -> Any:
        """The value of the input `name` with new sizes."""
        if not isinstance(fake, torch.Tensor):
            return fake
        shape = [
            size if isinstance(size, int) else self._size(size, self.given.get((name, dim)))
            for dim, size in enumerate(fake.shape)
        ]
        with self.fake_mode:
            return torch.empty(shape, dtype=fake.dtype, device=fake.device)

    def _size(self, old: torch.SymInt, given: Size | None) -> int | torch.SymInt:
        key = old.node.expr
        if key not in self.new:
            given = given or Size(max(2, old.node.hint))
            if given.most == 1:
                return 1
            source = ConstantSource(f"size_{len(self.new)}")
            symbol = self.environment.create_symbol(given.usual, source, dynamic_dim=DimDynamic.DYNAMIC)
            size = self.environment.create_symintnode(symbol, hint=given.usual, source=source)
            assert isinstance(size, torch.SymInt)
            # From 2 on: torch takes what it traces to hold for 1 too, and so does Torch-TensorRT.
            most = int_oo if given.most is None else given.most
            self.environment.var_to_range[size.node.expr] = ValueRanges(2, most)
            self.new[key] = size
        return self.new[key]

    def ranges(self) -> dict[Any, Any]:
        symbols = [size.node.expr for size in self.new.values()]
        return {symbol: self.environment.var_to_range[symbol] for symbol in symbols}


def _check_sizes(before: ExportedProgram, after: ExportedProgram) -> None:
    """Sizes of inputs that were symbols are the same symbols still."""
    found = {n.name: n.meta["val"] for n in after.graph.find_nodes(op="placeholder")}
    for node in before.graph.find_nodes(op="placeholder"):
        fake = node.meta["val"]
        if isinstance(fake, torch.Tensor) and str(found[node.name].shape) != str(fake.shape):
            raise CaptureError(
                f"Decomposing fixed the input {node.name} to {list(found[node.name].shape)} where it should take any "
                f"{list(fake.shape)}. This is a bug of reroute_fx or of torch {torch.__version__}; please report it."
            )


def _within(index: torch.Tensor, end: int) -> torch.Tensor:
    """`index` where it is below `end`, and 0 elsewhere."""
    return index * index.lt(end).to(index.dtype)


def visual_scores(
    query: torch.Tensor, keys: torch.Tensor, visual_index: torch.Tensor, lengths: torch.Tensor, scale: float
) -> torch.Tensor:
    """See `reroute_fx.kernels.visual_scores`."""
    batch, heads, _, head_dim = query.shape
    kv_heads, length = keys.shape[1:3]
    grouped = query.float().reshape(batch, kv_heads, heads // kv_heads, head_dim)
    logits = grouped @ keys.float().transpose(2, 3) * scale  # [B, Hkv, H/Hkv, S]
    is_padding = torch.arange(length, device=keys.device) >= lengths.unsqueeze(1)
    logits = logits.masked_fill(is_padding.unsqueeze(1).unsqueeze(1), -torch.inf)
    attention = logits.softmax(dim=-1).mean(dim=(1, 2))  # [B, S]
    scores = attention[row_numbers(batch, visual_index), _within(visual_index, length)]
    return scores.masked_fill(visual_index >= lengths.unsqueeze(1), -torch.inf)


def compact_tokens(
    tensors: Sequence[torch.Tensor], positions: torch.Tensor, sequence_dims: Sequence[int]
) -> list[torch.Tensor]:
    """See `reroute_fx.kernels.compact_tokens`."""
    return [_compact(x, positions, dim) for x, dim in zip(tensors, sequence_dims, strict=True)]


def _compact(x: torch.Tensor, positions: torch.Tensor, dim: int) -> torch.Tensor:
    batch, length = positions.shape[0], x.shape[dim]
    source = x.expand(*x.shape[: dim - 1], batch, *x.shape[dim:])
    index = [None] * (dim - 1) + [row_numbers(batch, positions), _within(positions, length)]
    rows: torch.Tensor = aten.index.Tensor(source, index)
    is_none = positions >= length
    for _ in range(x.ndim - dim - 1):
        is_none = is_none.unsqueeze(-1)
    return rows.masked_fill(is_none, 0)


def restore_tokens(stream: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """See `reroute_fx.kernels.restore_tokens`."""
    length = stream.shape[1]
    number = torch.arange(positions.shape[1], device=positions.device)
    # What is not written goes to a place of its own behind the stream: no place is written twice.
    place = torch.where(positions < length, positions, number + length)
    longer = torch.cat([stream, rows], dim=1)
    return longer.scatter(1, place.unsqueeze(2).expand_as(rows), rows)[:, :length].contiguous()


def _cumsum(x: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Any:
    """Counts along the rows of a matrix; any other sum stays as it is."""
    if x.dtype != torch.bool or x.ndim != 2 or dim not in (1, -1) or dtype not in (None, torch.int64):
        return NotImplemented
    return count_before(x) + x.to(torch.int64)


def _index_put(
    x: torch.Tensor,
    indices: Sequence[torch.Tensor | None],
    values: torch.Tensor,
    accumulate: bool = False,
) -> Any:
    """``x[rows, :, slots] = values`` as a scatter of rows; any other stays as it is.

    Torch-TensorRT's own conversion writes element by element, from an index that it builds for each.
    """
    if len(indices) != 3 or indices[1] is not None or accumulate:
        return NotImplemented
    row, _, slot = indices
    if row is None or slot is None or torch.bool in (row.dtype, slot.dtype):
        return NotImplemented
    heads, capacity, width = x.shape[1], x.shape[2], x.shape[3:]
    head = torch.arange(heads, device=x.device)
    places = (row.unsqueeze(-1) * heads + head) * capacity + slot.unsqueeze(-1)  # [B, Q, H]
    new = values.expand(*places.shape, *width).reshape(-1, *width)
    index = places.reshape(-1, *(1 for _ in width)).expand_as(new)
    return x.reshape(-1, *width).scatter(0, index, new).reshape(x.shape)


def _index_put_(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    result = _index_put(x, *args, **kwargs)
    return result if result is NotImplemented else x.copy_(result)


_OURS: dict[Operator, Callable[..., Any]] = {
    reroute.attention_with_sinks.default: kernels.attention_with_sinks_reference,
    reroute.attention_with_softcap.default: kernels.attention_with_softcap_reference,
    reroute.visual_scores.default: visual_scores,
    reroute.select_tokens.default: select_tokens_by_counting,
    reroute.compact_tokens.default: compact_tokens,
    reroute.restore_tokens.default: restore_tokens,
    aten.cumsum.default: _cumsum,
    aten.index_put.default: _index_put,
    aten.index_put_.default: _index_put_,
}
"""What has no converter, or none for symbolic sizes, or one that is not exact."""


def _reshape(x: torch.Tensor, size: Sequence[Any]) -> torch.Tensor:
    reshaped: torch.Tensor = aten._reshape_copy.default(x, size)
    return reshaped


_THEIRS: dict[Operator, Callable[..., Any]] = {
    aten.rsqrt.default: lambda x: x.sqrt().reciprocal(),
    aten.reciprocal.default: lambda x: torch.div(1, x),
    aten.silu.default: lambda x: x * x.sigmoid(),
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.alias.default: lambda x: x,
}
"""Of the decompositions that Torch-TensorRT has of its own, those that routed programs can need."""


def _decompositions() -> dict[Operator, Callable[..., Any]]:
    """The decompositions that `torch_tensorrt.dynamo.compile` applies, and ours."""
    recorded = load_recorded()["decompositions"]
    listed = [operator for name in recorded["torch"] if (operator := find_operator(name)) is not None]
    kept = {find_operator(name) for name in recorded["kept"]} | {aten.scaled_dot_product_attention.default}
    composite = _collect_all_valid_cia_ops_for_aten_namespace()
    return {
        **get_decompositions(listed),
        **{operator: _get_decomp_for_cia(operator) for operator in composite if operator not in kept},
        **_THEIRS,
        **_OURS,
    }


def find_operator(name: str) -> Operator | None:
    """The operator of a recorded name such as ``aten.add.Tensor``, with or without overload; None if torch lacks it."""
    found: Any = torch.ops
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


@functools.cache
def load_recorded() -> dict[str, Any]:
    """What a release of Torch-TensorRT registers, as benchmarks/record_converters.py wrote it down."""
    path = files(__package__) / "data" / "torch_tensorrt_converters.json"
    recorded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return recorded
