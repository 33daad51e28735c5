"""The graph that the passes edit: an exported decoder with what the passes have learnt about it."""

from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.node import map_arg

from .base_errors import MatchError
from .memory import shared_memory


@dataclass(frozen=True)
class Reach:
    """Which of the tokens up to itself a token sees. Tokens are counted as in the prompt, those that wait included.

    Attributes:
        window: the last so many, itself among them; None for all.
        chunk: those of its chunk, which are so many from the first token of the row on; None for all.
        groups: whether it sees those of its group too that come after it.
        state: whether it knows them by a state of fixed size (linear attention, convolutions), not by attention.
    """

    window: int | None = None
    chunk: int | None = None
    groups: bool = False
    state: bool = False

    @property
    def counts_tokens(self) -> bool:
        """Whether a token sees only some of the earlier ones, by how far back they are."""
        return self.window is not None or self.chunk is not None

    def __str__(self) -> str:
        sizes = {"a window": self.window, "chunks": self.chunk}
        found = [f"{name} of {size} tokens" for name, size in sizes.items() if size is not None]
        return " and ".join(found) or ("a state" if self.state else "all earlier tokens")


CAUSAL = Reach()


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of one layer; multiply-adds are for one token.

    Attributes:
        linear: multiply-adds of all linear maps.
        query: of these, what computes a query.
        key: of these, what computes a key.
        attention_width: query heads times head dimension.
        kv_width: key-value heads times head dimension.
        uncounted: matrix products of the layer that `linear` leaves out.
    """

    linear: int
    query: int
    key: int
    attention_width: int
    kv_width: int
    uncounted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layer:
    """The nodes of one decoder layer: between two values of the residual stream, around one attention or recurrence.

    Attributes:
        index: position in the decoder, 0-based.
        start: residual stream at the layer's input, ``[B, S, d]``.
        end: residual stream at its output.
        attention: the canonical attention node; of a layer with a state its last recurrence.
        nodes: what computes `end` from `start`, with helpers that no other layer reads, in graph order;
            `start` is not among them.
        sizes: what the layer's cost follows from.
        addends: what `end` adds to the stream last that does not come from it, ``[B, S, d]`` each, in order.
        source: earlier layer with whose keys and values it attends; None if it has its own.
    """

    index: int
    start: fx.Node
    end: fx.Node
    attention: fx.Node
    nodes: tuple[fx.Node, ...]
    sizes: LayerSizes
    addends: tuple[fx.Node, ...] = ()
    source: int | None = None


@dataclass(frozen=True)
class Decision:
    """The nodes that score and select before a decision layer.

    Attributes:
        layer: decision layer, 0-based.
        scoring_layer: layer whose attention ranks: that one or the one before.
        visual_index: positions of the tokens to choose from in the current stream, ``[B, N]``.
        lengths: tokens of each row in the current stream, ``[B]``.
        scores: ``[B, N]`` float32.
        positions: active positions in the current stream, ``[B, S']``.
        kept: which visual tokens are kept, ``[B, N]`` bool.
        nodes: everything that was inserted for the decision, in graph order.
        text_index: positions of the text behind the last picture, ``[B, T]``; None if its rule doesn't ask for it.
    """

    layer: int
    scoring_layer: Layer
    visual_index: fx.Node
    lengths: fx.Node
    scores: fx.Node
    positions: fx.Node
    kept: fx.Node
    nodes: tuple[fx.Node, ...]
    text_index: fx.Node | None = None


@dataclass
class ModelGraph:
    """A copy of an exported decoder's graph, open for editing.

    Attributes:
        fx_graph: what is edited, with parameters as placeholders. No code is generated from it before it is a program.
        root: module whose attributes it may read.
        parameters: names of the placeholders that hold parameters, buffers and constants.
        fake_mode: owner of the fake tensors in ``node.meta["val"]``.
        layers: set by `FindLayers`.
        decisions: set by `InsertSelection`, updated by `RouteStages`.
        reaches: what the tokens of each attention see, in graph order, set by `ProveCausal`; of each layer behind
            `FindLayers`.
        token_index: place of each token in its row, ``[1, S]``, which masks are computed from; None if there are none.
        stage_indices: for each stage with such masks, by its first layer, that of its rows, ``[B, S']``; set by
            `RouteStages`.
        states: set by `FindStates`, of a vision tower.
        streams: residual stream before each layer, with all S rows; set by `RouteStages` if asked to keep them.
        added_inputs: placeholders added by the passes, in order.
        new_sizes: symbolic sizes that the added inputs brought in, by name.
        outputs: named outputs added by the passes, in order; they follow the original ones.
        unused_inputs: inputs that no node reads any more because a pass proved them away.
        facts: what the passes that ran have made true of the graph.
    """

    fx_graph: fx.Graph
    root: torch.nn.Module
    parameters: frozenset[str]
    fake_mode: FakeTensorMode
    layers: tuple[Layer, ...] = ()
    decisions: tuple[Decision, ...] = ()
    reaches: tuple[Reach, ...] = ()
    token_index: fx.Node | None = None
    stage_indices: dict[int, fx.Node] = field(default_factory=dict)
    states: tuple[fx.Node, ...] = ()
    streams: tuple[fx.Node, ...] = ()
    added_inputs: tuple[fx.Node, ...] = ()
    new_sizes: dict[str, torch.SymInt] = field(default_factory=dict)
    outputs: dict[str, fx.Node] = field(default_factory=dict)
    unused_inputs: tuple[str, ...] = ()
    facts: frozenset[str] = frozenset()

    @classmethod
    def from_program(cls, program: ExportedProgram) -> "ModelGraph":
        """Copy the graph of `program`; the program itself is never changed."""
        graph = _copy(program.graph, {})
        values = [n.meta["val"] for n in graph.nodes if "val" in n.meta]
        fake_mode = detect_fake_mode(values)
        if fake_mode is None:
            raise MatchError(
                "The exported program carries no fake tensors in node.meta['val']; expected a program as "
                "torch.export.export returns it."
            )
        parameters = frozenset(
            spec.arg.name
            for spec in program.graph_signature.input_specs
            if spec.kind is not InputKind.USER_INPUT
        )
        _functionalize(graph, fake_mode)
        return cls(graph, program.graph_module, parameters, fake_mode)

    def copy(self) -> "ModelGraph":
        """The same graph, open for other edits; fake tensors and symbolic sizes are shared."""
        copies: dict[fx.Node, fx.Node] = {}
        graph = _copy(self.fx_graph, copies)
        known = {f.name: _of_copies(getattr(self, f.name), copies) for f in fields(self)}
        return ModelGraph(**known | {"fx_graph": graph})

    @property
    def inputs(self) -> list[fx.Node]:
        """Placeholders that the caller fills, in order."""
        return [n for n in self.fx_graph.find_nodes(op="placeholder") if n.name not in self.parameters]

    def clean_up(self) -> None:
        """Remove nodes that nothing reads and check the graph. Decisions and states stay until a pass uses them."""
        live = {n for d in self.decisions for n in (d.scores, d.positions, d.kept)} | {
            *self.states,
            *self.streams,
        }
        self.fx_graph.eliminate_dead_code(
            lambda n: n.op in ("placeholder", "output") or n in live or _writes(n)
        )
        self.fx_graph.lint()

    def to_text(self) -> str:
        """The graph in static single assignment form with shapes and dtypes."""
        return "\n".join(_line(node) for node in self.fx_graph.nodes) + "\n"


def _copy(graph: fx.Graph, copies: dict[fx.Node, fx.Node]) -> fx.Graph:
    """A copy of a graph; `copies` is filled with the copy of each node."""
    copy = fx.Graph()
    returned: Any = copy.graph_copy(graph, copies)
    copy.output(returned).meta = dict(graph.output_node().meta)
    return copy


def _of_copies(known: Any, copies: dict[fx.Node, fx.Node]) -> Any:
    """What is known about a graph, about its copy: `known` with copies of the nodes in it."""
    if isinstance(known, fx.Node):
        return copies[known]
    if isinstance(known, tuple):
        return tuple(_of_copies(part, copies) for part in known)
    if isinstance(known, dict):
        return {name: _of_copies(part, copies) for name, part in known.items()}
    if is_dataclass(known) and not isinstance(known, type):
        return replace(known, **{f.name: _of_copies(getattr(known, f.name), copies) for f in fields(known)})
    return known


def _functionalize(graph: fx.Graph, fake_mode: FakeTensorMode) -> None:
    """Turn in-place calls into ordinary ones, as long as no older value that shares the written memory is read later.

    Before: ``aten.div_(%x, %y)``, later readers of %x
    After:  ``%z = aten.div(%x, %y)``, later readers of %z
    """
    writes = [node for node in graph.nodes if _writes(node)]
    if not writes:
        return
    order = {node: i for i, node in enumerate(graph.nodes)}
    memory = shared_memory(graph.nodes)
    for node in writes:
        written, functional = node.args[0], _functional(node, fake_mode)
        if functional is None:
            raise _refuse_write(node, "its argument and knows no other way")
        sharing = memory[node] | memory[written]  # type: ignore[index]
        older = [n for n in sharing if n is not written and order[n] < order[node]]
        if any(n.op == "placeholder" for n in sharing) or any(_is_read_after(n, node, order) for n in older):
            raise _refuse_write(node, "memory that other values share")
        node.target = functional
        for user in [u for u in written.users if order[u] > order[node]]:  # type: ignore[union-attr]
            user.replace_input_with(written, node)  # type: ignore[arg-type]


def _is_read_after(node: fx.Node, write: fx.Node, order: dict[fx.Node, int]) -> bool:
    return any(order[user] > order[write] for user in node.users)


def _refuse_write(node: fx.Node, what: str) -> MatchError:
    return MatchError(
        f"%{node.name} ({node.target}) writes into {what}; expected a program without such writes. Call "
        f"run_decompositions() on it first."
    )


def _functional(node: fx.Node, fake_mode: FakeTensorMode) -> Any | None:
    """The operator that returns what an in-place one writes into its first argument."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    namespace, _, name = schema.name.partition("::")
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if namespace != "aten" or not name.endswith("_") or written != [schema.arguments[0].name]:
        return None
    functional = getattr(packet, schema.overload_name or "default", None)
    return functional if functional is not None and _keeps_dtype(functional, node, fake_mode) else None


def _keeps_dtype(functional: Any, node: fx.Node, fake_mode: FakeTensorMode) -> bool:
    """Whether it returns what is written: an in-place addition of float32 to bfloat16 writes bfloat16."""
    args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    with fake_mode, enable_python_dispatcher(), torch.no_grad():
        result = functional(*args, **kwargs)
    return bool(result.dtype == node.args[0].meta["val"].dtype)  # type: ignore[union-attr]


def _writes(node: fx.Node) -> bool:
    """Whether a call writes into one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _line(node: fx.Node) -> str:
    value = node.meta.get("val")
    kind = (
        f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
        if isinstance(value, torch.Tensor)
        else str(value)
    )
    if node.op == "placeholder":
        return f"%{node.name} : {kind} = input"
    arguments = ", ".join(str(a) for a in (*node.args, *(f"{k}={v}" for k, v in node.kwargs.items())))
    region = node.meta.get("region")
    return f"%{node.name} : {kind} = {node.target}({arguments})" + (f"  # {region}" if region else "")
