"""Find the decoder layers: one region of the residual stream around each attention or recurrence.

Before: a flat graph.
After:  the same graph; `ModelGraph.layers` holds a `Layer` for each attention and its nodes carry
        ``meta["region"] = "layer.<index>"``.

The residual stream is found by dataflow. A value that every path from the stream's source to the
output runs through is a *cut*. A cut that adds something to an earlier cut is a residual update. A
layer reaches from the last residual update before its attention to the last one before the next
attention. What is added between two layers, visual features say, belongs to the first of them, and so does a
number that the stream is multiplied with. Inside a layer nothing may be read from outside, tokens may see
each other in the attention only, and that must read its query, keys and values from its own layer, or keys
and values from one earlier layer, which shares them. Where a layer has recurrences (a causal convolution,
linear attention) in the place of an attention, the last of them stands for it.

What several layers read of the embeddings beside the stream, embeddings for each layer say, is no part of
any layer: it is a sequence tensor, as cos and sin are.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType

from torch import fx

from .base_errors import MatchError
from .base_pass import Pass, PassResult, Rejection, refuse
from .canonicalize_attention import ATTENTION, attention_arguments, attentions
from .graph_edit import (
    ancestors,
    aten,
    descendants,
    expression,
    is_op,
    is_tensor,
    sequence_dims,
    shape,
    value,
)
from .model_graph import Layer, LayerSizes, ModelGraph, Reach
from .recurrences import RECURRENCES, recurrences, token_arguments
from .shared_caches import attended_states
from .token_mixing import TokenMixing, numbers_tokens


class FindLayers(Pass):
    """Args:
    num_layers: layers of the decoder; None accepts any number above zero.
    """

    requires = ("causal attention",)
    provides = ("layers",)
    excludes = ("decisions", "caches", "outputs")

    def __init__(self, num_layers: int | None = None) -> None:
        self.num_layers = num_layers

    def apply(self, graph: ModelGraph) -> PassResult:
        blocks = list(attentions(graph))
        expected = f"{self.num_layers} decoder layers" if self.num_layers else "at least one decoder layer"
        if not blocks:
            raise refuse("No attention was found", expected, ())
        sharing = sharing_attentions(blocks)
        paths = _residual_stream(graph, blocks, sharing)
        if paths is None:
            raise refuse(
                f"{len(blocks)} attentions were found but no residual stream runs around them",
                expected,
                (_why_no_stream(graph, blocks),),
            )
        stream, aside = paths
        _refuse_fixed_length(stream[0])
        mixers = _mixers(graph, stream, blocks)
        layers, rejected = _split(graph, stream, mixers, aside, sharing)
        if layers:
            mixing = TokenMixing(graph.fx_graph.nodes, layers[0].start)
            rejected += [r for layer in layers if (r := _why_not_closed(layer, mixing, sharing)) is not None]
        if rejected or (self.num_layers is not None and len(layers) != self.num_layers):
            rejected += _longest(layers) if not rejected else []
            raise refuse(f"{len(layers)} decoder layers were found", expected, tuple(rejected))
        for layer in layers:
            for node in layer.nodes:
                node.meta["region"] = f"layer.{layer.index}"
        graph.layers = tuple(layers)
        known = dict(zip(blocks, graph.reaches, strict=True))
        graph.reaches = tuple(known.get(layer.attention, Reach(state=True)) for layer in layers)
        return PassResult(self.name, matched=len(layers))


def _refuse_fixed_length(source: fx.Node) -> None:
    length = shape(source)[1]
    if isinstance(length, int):
        raise MatchError(
            f"%{source.name} has a fixed length of {length}; expected a dynamic one. Export the decoder with a dynamic "
            f"batch and length."
        )


def _mixers(graph: ModelGraph, cuts: Sequence[fx.Node], blocks: Sequence[fx.Node]) -> list[fx.Node]:
    """Attentions, and the last recurrence of each stretch of the stream that has some, in graph order."""
    order = {node: i for i, node in enumerate(graph.fx_graph.nodes)}
    found = sorted([*blocks, *recurrences(graph.fx_graph.nodes)], key=order.__getitem__)
    updates = [order[update] for update in _updates(cuts)]

    def is_passed(node: fx.Node, following: fx.Node) -> bool:
        apart = any(order[node] < update < order[following] for update in updates)
        return is_op(node, *RECURRENCES) and is_op(following, *RECURRENCES) and not apart

    return [
        node
        for node, after in zip(found, [*found[1:], None], strict=True)
        if after is None or not is_passed(node, after)
    ]


def sharing_attentions(blocks: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Canonical attentions, in graph order, that read the keys and values of an earlier one; and which that is."""
    first: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
    for block in blocks:
        first.setdefault(attended_states(block), block)
    sources = {block: first[attended_states(block)] for block in blocks}
    return {block: source for block, source in sources.items() if source is not block}


def _residual_stream(
    graph: ModelGraph, blocks: Sequence[fx.Node], sharing: Mapping[fx.Node, fx.Node]
) -> tuple[list[fx.Node], set[fx.Node]] | None:
    """Cuts of the stream that all attentions hang on, from its source to the output; and what is beside it.

    Beside it is what is computed of the source, but neither for the first attention or recurrence nor behind it.
    """
    output = graph.fx_graph.output_node()
    order = {node: i for i, node in enumerate(graph.fx_graph.nodes)}
    first = min([*blocks, *recurrences(graph.fx_graph.nodes)], key=order.__getitem__)
    leading, behind = ancestors([first]), descendants(first)
    for source in graph.fx_graph.nodes:
        is_source = source in graph.inputs or is_op(source, aten.embedding)
        if not is_source or not is_tensor(source) or not value(source).is_floating_point():
            continue
        reached = descendants(source)
        aside = reached - leading - behind if source in leading else set()
        cuts = _cuts(graph, source, output, aside, sharing)
        if _updates(cuts) and any(attention_arguments(b).value in reached for b in blocks):
            return cuts, aside
    return None


def _cuts(
    graph: ModelGraph,
    source: fx.Node,
    output: fx.Node,
    aside: Collection[fx.Node] = (),
    sharing: Mapping[fx.Node, fx.Node] = MappingProxyType({}),
) -> list[fx.Node]:
    """Nodes that every path from `source` to `output` runs through, in graph order.

    In topological order these are the nodes that no edge spans. Paths by what is `aside`, and by keys and values that
    attentions share, don't count.
    """
    between = (descendants(source) & ancestors([output])).difference(aside)
    ordered = [n for n in graph.fx_graph.nodes if n in between]
    place = {n: i for i, n in enumerate(ordered)}
    shared = {block: set(attended_states(block)) for block in sharing}
    cuts, reach = [], 0
    for i, node in enumerate(ordered):
        if reach <= i and node.op != "output":
            cuts.append(node)
        reach = max([reach, *(place[u] for u in node.users if u in place and node not in shared.get(u, ()))])
    return cuts


def _updates(cuts: Sequence[fx.Node]) -> list[fx.Node]:
    """Cuts that add something to an earlier cut, or multiply such a sum with what is the same for all tokens."""
    earlier: set[fx.Node] = set()
    updates: list[fx.Node] = []
    for cut in cuts:
        if _adds_to(cut, earlier) or (updates and _scales(cut, updates[-1])):
            updates.append(cut)
        earlier.add(cut)
    return updates


def _scales(node: fx.Node, update: fx.Node) -> bool:
    if not is_op(node, aten.mul.Tensor) or update not in node.args:
        return False
    others = [a for a in node.args if a is not update and is_tensor(a)]
    return all(isinstance(size, int) for other in others for size in shape(other))


def _adds_to(node: fx.Node, earlier: set[fx.Node]) -> bool:
    """Whether `node` is a sum, possibly of several terms, with an earlier cut among them."""
    if not is_op(node, aten.add.Tensor):
        return False
    terms = [a for a in node.args if is_tensor(a)]
    return any(t in earlier or _adds_to(t, earlier) for t in terms)  # type: ignore[arg-type]


def _split(
    graph: ModelGraph,
    cuts: Sequence[fx.Node],
    blocks: Sequence[fx.Node],
    aside: Collection[fx.Node],
    sharing: Mapping[fx.Node, fx.Node],
) -> tuple[list[Layer], list[Rejection]]:
    """Assign to each attention the stretch of the stream that it updates."""
    updates = _updates(cuts)
    order = {node: i for i, node in enumerate(blocks[0].graph.nodes)}
    # One that a single layer reads is none of its helpers: each stage makes its own.
    masks = ancestors(
        mask
        for node in blocks
        if not is_op(node, *RECURRENCES) and (mask := attention_arguments(node).mask) is not None
    )
    layers: list[Layer] = []
    rejected: list[Rejection] = []
    for i, block in enumerate(blocks):
        before = [u for u in updates if order[u] < order[block]]
        start = before[-1] if before else _last_before(cuts, block, order)
        limit = order[blocks[i + 1]] if i + 1 < len(blocks) else len(order)
        inside = [u for u in updates if order[start] < order[u] < limit and order[u] > order[block]]
        if not inside:
            rejected.append(_why_no_update(block, cuts[0], limit, order))
            continue
        end = inside[-1]
        elsewhere = ancestors([graph.fx_graph.output_node()], stop=end).intersection(aside)
        nodes = _between(start, end) - masks - elsewhere
        ordered = tuple(sorted(nodes, key=order.__getitem__))
        sizes = _measure(graph, start, block, ordered)
        source = blocks.index(sharing[block]) if block in sharing else None
        layers.append(Layer(len(layers), start, end, block, ordered, sizes, _addends(start, end), source))
    return layers, rejected


def _addends(start: fx.Node, end: fx.Node) -> tuple[fx.Node, ...]:
    """What a layer adds to the stream last, for each token and from outside the stream."""
    found: list[fx.Node] = []
    while is_op(end, aten.add.Tensor) and not end.kwargs:
        terms = [a for a in end.args if isinstance(a, fx.Node)]
        outside = [a for a in terms if start not in ancestors([a], stop=start)]
        if len(outside) != 1 or not _is_like(outside[0], start):
            break
        found += outside
        (end,) = (a for a in terms if a not in outside)
    return tuple(reversed(found))


def _is_like(node: fx.Node, stream: fx.Node) -> bool:
    return is_tensor(node) and [*map(expression, shape(node))] == [*map(expression, shape(stream))]


def _measure(graph: ModelGraph, start: fx.Node, block: fx.Node, nodes: Sequence[fx.Node]) -> LayerSizes:
    constants = _constants(graph, nodes)
    weights = {node for node in constants if is_tensor(node) and len(shape(node)) > 1}
    uncounted = {
        str(node.target)
        for node in nodes
        if node not in constants
        and weights.intersection(node.all_input_nodes)
        and _weight(node, weights) is None
    }
    if is_op(block, *RECURRENCES):
        names = uncounted.union(str(node.target) for node in recurrences(nodes))
        return LayerSizes(_multiply_adds(nodes, weights), 0, 0, 0, 0, tuple(sorted(names)))
    given = attention_arguments(block)
    query, key = shape(given.query), shape(given.key)
    inside = set(nodes)
    return LayerSizes(
        linear=_multiply_adds(nodes, weights),
        query=_multiply_adds(ancestors([given.query], stop=start) & inside, weights),
        key=_multiply_adds(ancestors([given.key], stop=start) & inside, weights),
        attention_width=int(query[1]) * int(query[3]),
        kv_width=int(key[1]) * int(key[3]),
        uncounted=tuple(sorted(uncounted)),
    )


def _constants(graph: ModelGraph, nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Parameters that `nodes` read, and what is computed from parameters alone, as packed weights are."""
    constants = {n for node in nodes for n in node.all_input_nodes if n.name in graph.parameters}
    for node in nodes:
        if node.all_input_nodes and constants.issuperset(node.all_input_nodes):
            constants.add(node)
    return constants


def _weight(node: fx.Node, weights: set[fx.Node]) -> fx.Node | None:
    """The matrix of a linear map."""
    is_map = is_op(node, aten.linear) or (is_op(node, aten.mm) and node.args[1] in weights)
    return node.args[1] if is_map else None  # type: ignore[return-value]


def _multiply_adds(nodes: Iterable[fx.Node], weights: set[fx.Node]) -> int:
    """Of the linear maps among `nodes`, for one token."""
    maps = (weight for node in nodes if (weight := _weight(node, weights)) is not None)
    return sum(int(rows) * int(columns) for rows, columns in map(shape, maps))


def _between(start: fx.Node, end: fx.Node) -> set[fx.Node]:
    """What computes `end` from `start`, with the helpers (an unsqueezed cos, say) that nothing else reads."""
    needed = ancestors([end], stop=start) - {start}
    nodes = needed & descendants(start)
    for node in reversed(start.graph.nodes):
        if node in needed and node.op == "call_function" and nodes.issuperset(node.users):
            nodes.add(node)
    return nodes


def _last_before(cuts: Sequence[fx.Node], block: fx.Node, order: dict[fx.Node, int]) -> fx.Node:
    """Where the first layer starts: the first cut that both a norm and an addition read."""
    for cut in cuts:
        if order[cut] < order[block] and sum(map(is_tensor, cut.users)) > 1:
            return cut
    return cuts[0]


def _why_no_update(block: fx.Node, source: fx.Node, limit: int, order: dict[fx.Node, int]) -> Rejection:
    """Name the value that is still read after the layer, so that the layer does not end."""
    last = len(order) - 1
    for node in sorted(descendants(source), key=order.__getitem__):
        late = [u for u in node.users if order[u] > limit or (u.op == "output" and limit < last)]
        if order[node] < order[block] and late:
            return Rejection(node.name, f"it is inside a layer and also read outside, by %{late[0].name}")
    for node in sorted(descendants(block), key=order.__getitem__):
        late = [u for u in node.users if order[u] > limit or u.op == "output"]
        if order[node] < limit and late:
            return Rejection(node.name, f"it is inside a layer and also read outside, by %{late[0].name}")
    return Rejection(block.name, "its result is not added to the residual stream")


def _why_not_closed(
    layer: Layer, mixing: TokenMixing, sharing: Mapping[fx.Node, fx.Node]
) -> Rejection | None:
    """What keeps the region from being moved to another token set."""
    if len(shape(layer.start)) != 3:
        reason = f"the stream before layer {layer.index} is {list(shape(layer.start))}, not [B, S, d]"
        return Rejection(layer.start.name, reason)
    nodes, stream = set(layer.nodes), descendants(layer.start)
    lent = {block: attended_states(block) for block, source in sharing.items() if source is layer.attention}
    for name, source in _sources(layer):
        if source not in nodes or source not in stream:
            reason = f"its {name} %{source.name} come from outside the residual stream (cross-attention?)"
            return Rejection(layer.attention.name, reason)
    length = expression(shape(layer.start)[1])
    for node in layer.nodes:
        if node in mixing.reasons:
            return Rejection(node.name, f"in layer {layer.index} {mixing.reasons[node]}")
        if is_op(node, *ATTENTION) and not mixing.attends_along_tokens(node):
            return Rejection(
                node.name, f"in layer {layer.index} it attends along another dimension than the tokens"
            )
        outside = [u for u in node.users if u not in nodes and node not in lent.get(u, ())]
        if node is not layer.end and outside:
            reason = f"it is inside layer {layer.index} and also read outside, by %{outside[0].name}"
            return Rejection(node.name, reason)
    # On fewer tokens a helper without a batch dimension, an arange say, would renumber positions.
    for node in layer.nodes:
        if numbers_tokens(node, length):
            return Rejection(node.name, f"in layer {layer.index} it numbers the tokens ({node.target})")
        if node not in stream and is_tensor(node) and 0 in sequence_dims(node, length):
            form = f"%{node.name} of shape {list(shape(node))} in layer {layer.index}"
            return Rejection(node.name, f"{form} has a layout that can't be compacted")
    return None


def _sources(layer: Layer) -> list[tuple[str, fx.Node]]:
    """What the attention or the recurrences of a layer read, by what it is to them."""
    found = recurrences(layer.nodes)
    if found:
        return [("inputs", source) for node in found for source, _ in token_arguments(node)]
    given = attention_arguments(layer.attention)
    own = [("keys", given.key), ("values", given.value)] if layer.source is None else []
    return [("query", given.query), *own]


def _why_no_stream(graph: ModelGraph, blocks: Sequence[fx.Node]) -> Rejection:
    output = graph.fx_graph.output_node()
    candidates = [
        n for n in graph.inputs if is_tensor(n) and value(n).is_floating_point() and len(shape(n)) == 3
    ]
    for source in candidates:
        cuts = set(_cuts(graph, source, output))
        for node in descendants(source):
            if is_op(node, aten.add.Tensor) and node not in cuts and output in node.users:
                return Rejection(node.name, "an intermediate value is also an output")
    return Rejection(blocks[0].name, "no chain of residual additions encloses it")


def _longest(layers: Sequence[Layer]) -> list[Rejection]:
    """The layer with the most nodes: with a layer missing, it holds more than one."""
    usual = sorted(len(layer.nodes) for layer in layers)[len(layers) // 2]
    layer = max(layers, key=lambda layer: len(layer.nodes))
    if len(layer.nodes) == usual:
        return []
    reason = f"layer {layer.index} around it has {len(layer.nodes)} nodes, most have {usual}"
    return [Rejection(layer.attention.name, reason)]
