"""Prove what attention masks say, and spell each kind of them once.

Before: ``attention(q, k, v, %mask)`` with %mask computed from ``arange <= arange``, and-ed with a
        [B, S] padding input when the decoder was exported with one.
After:  ``attention(q, k, v, None, is_causal=True)``. A padding input is not read any more and is
        named in `ModelGraph.unused_inputs`: the program holds for rows without padding.

Before: the same, and-ed with ``arange > arange - 8`` as well: a token sees itself and the 7 before it.
        Or and-ed with ``arange // 8 == arange // 8``, counted from each row's first token: those of its chunk.
After:  ``attention(q, k, v, %window)``, with ``%window [1, 1, S, S]`` computed from `ModelGraph.token_index` once for
        all such layers; `ModelGraph.reaches` says what each attention sees.

The mask is evaluated symbolically: each node becomes a formula over (batch, query, key). A mask
that is not exactly the conjunction of ``key <= query``, at most one window, chunks of one size, and padding is refused,
with the first node that is not understood.
"""

from collections.abc import Sequence

import torch
from torch import fx

from .base_pass import Pass, PassResult, Rejection, refuse
from .canonicalize_attention import Attention, attention_arguments, attentions, change_attention
from .graph_edit import aten, edit_after, is_op, same_size, shape, value
from .mask_formulas import (
    BATCH,
    KEY,
    Input,
    KeyAtLeastQueryPlus,
    KeyAtMostQueryPlus,
    Mask,
    NotUnderstood,
    SameChunk,
    evaluate,
)
from .model_graph import CAUSAL, ModelGraph, Reach
from .reach_masks import emit_masks


class ProveCausal(Pass):
    """Args:
    padding: names of the inputs ``[B, S]`` that say which tokens are no padding. Another input that a mask is and-ed
        with is refused: it may forbid more.
    """

    requires = ("canonical attention",)
    provides = ("causal attention",)

    def __init__(self, padding: Sequence[str] = ("attention_mask",)) -> None:
        self.padding = frozenset(padding)

    def apply(self, graph: ModelGraph) -> PassResult:
        nodes, rejected = list(attentions(graph)), []
        given = [attention_arguments(node) for node in nodes]
        reaches: list[Reach] = []
        padding: set[str] = set()
        for node, attention in zip(nodes, given, strict=True):
            try:
                reach, names = _prove(attention, self.padding)
            except NotUnderstood as reason:
                rejected.append(Rejection(node.name, str(reason)))
                continue
            reaches.append(reach)
            padding |= names
        if rejected:
            raise refuse(
                f"{len(reaches)} attention masks are causal, {len(rejected)} are not",
                "key <= query, possibly and-ed with key > query - window or key // chunk == query // chunk, and with a "
                "[B, S] padding input",
                tuple(rejected),
            )
        masks = _emit_masks(graph, nodes, reaches, padding)
        for node, reach in zip(nodes, reaches, strict=True):
            change_attention(node, mask=masks.get(reach), is_causal=reach == CAUSAL)
        graph.reaches = tuple(reaches)
        for name in sorted(padding):
            _read_sizes_elsewhere(graph, name)
        graph.clean_up()
        graph.unused_inputs += tuple(n.name for n in graph.inputs if n.name in padding and not n.users)
        rewritten = sum(attention.mask is not None for attention in given)
        return PassResult(self.name, len(nodes), rewritten, detail=_detail(reaches, padding))


def _detail(reaches: Sequence[Reach], padding: set[str]) -> str:
    parts = [f"{reaches.count(reach)} with {reach}" for reach in dict.fromkeys(reaches) if reach != CAUSAL]
    if padding:
        parts.append(f"valid without padding: {', '.join(sorted(padding))} dropped")
    return "; ".join(parts)


def _emit_masks(
    graph: ModelGraph, nodes: Sequence[fx.Node], reaches: Sequence[Reach], padding: set[str]
) -> dict[Reach, fx.Node]:
    """A mask ``[1, 1, S, S]`` for each reach that needs one, and the token index that they are computed from."""
    needed = [reach for reach in dict.fromkeys(reaches) if reach != CAUSAL]
    if not needed:
        return {}
    sizes = [
        (node, dim)
        for node in graph.inputs
        for dim, size in enumerate(shape(node))
        if node.name not in padding and same_size(size, shape(attention_arguments(nodes[0]).query)[2])
    ]
    if not sizes:
        raise refuse("No input tells the number of tokens", "embeddings or token ids [B, S, ...]", ())
    with edit_after(graph, graph.inputs[-1], region="masks") as edit:
        length = edit.size(*sizes[0])
        count = edit.call(aten.arange.default, length, device=value(nodes[0]).device)
        graph.token_index = edit.call(aten.unsqueeze.default, count, 0)
        return emit_masks(edit, needed, graph.token_index)


def _read_sizes_elsewhere(graph: ModelGraph, name: str) -> None:
    """Let nodes that only want the batch or the length read it from another input."""
    dropped = next(n for n in graph.inputs if n.name == name)
    for user in [u for u in dropped.users if is_op(u, aten.sym_size)]:
        for other in graph.inputs:
            dims = [i for i, size in enumerate(shape(other)) if same_size(size, value(user))]
            if other is not dropped and dims:
                user.args = (other, dims[0])
                break


def _prove(given: Attention, known: frozenset[str]) -> tuple[Reach, set[str]]:
    """What a mask lets each token see, and the names of its padding inputs; `NotUnderstood` for other masks."""
    mask = given.mask
    if mask is None and given.is_causal:
        return CAUSAL, set()
    if mask is None:
        raise NotUnderstood("it has no mask and is not causal: every row sees every row")
    if given.is_causal:
        raise NotUnderstood("it has a mask and is_causal together")
    formula = evaluate(mask)
    if not isinstance(formula, Mask) or formula.additive is (value(mask).dtype is torch.bool):
        raise NotUnderstood(f"its mask %{mask.name} is {formula}, not a condition on query and key")
    rows, columns = shape(given.query)[2], shape(given.key)[2]
    if not (same_size(shape(mask)[-2], rows) and same_size(shape(mask)[-1], columns)):
        raise NotUnderstood(
            f"its mask %{mask.name} has shape {list(shape(mask))}, not [..., {rows}, {columns}]"
        )
    padding = {c for c in formula.conditions if isinstance(c, Input) and c.axes == (BATCH, KEY)}
    names = {c.name for c in padding} | {
        c.behind for c in formula.conditions if isinstance(c, SameChunk) and c.behind
    }
    others = sorted(names - known)
    if others:
        raise NotUnderstood(
            f"its mask %{mask.name} is and-ed with the input {others[0]!r}, which is no padding mask; those are "
            f"{sorted(known)}"
        )
    return _reach(mask, formula.conditions - padding), names


def _reach(mask: fx.Node, conditions: frozenset[object]) -> Reach:
    above = {c for c in conditions if isinstance(c, KeyAtMostQueryPlus)}
    below = sorted(1 - c.offset for c in conditions if isinstance(c, KeyAtLeastQueryPlus))
    if not any(c.offset <= 0 for c in above):
        raise NotUnderstood(f"its mask %{mask.name} does not imply key <= query")
    rest = {*conditions - above, *above - {KeyAtMostQueryPlus(0)}}
    chunks = sorted({c.size for c in conditions if isinstance(c, SameChunk)})
    rest -= {c for c in conditions if isinstance(c, (KeyAtLeastQueryPlus, SameChunk))}
    if rest:
        raise NotUnderstood(f"its mask %{mask.name} also demands {sorted(map(str, rest))}")
    if len(below) > 1:
        raise NotUnderstood(f"its mask %{mask.name} has windows of {below} tokens at once")
    if below and below[0] < 1:
        raise NotUnderstood(
            f"its mask %{mask.name} has a window of {below[0]} tokens, in which none sees itself"
        )
    if len(chunks) > 1:
        raise NotUnderstood(f"its mask %{mask.name} has chunks of {chunks} tokens at once")
    return Reach(window=below[0] if below else None, chunk=chunks[0] if chunks else None)
