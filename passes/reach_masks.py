"""The mask of what tokens see: see `Reach`."""

from collections.abc import Iterable

from torch import fx

from .graph_edit import Editor, aten
from .model_graph import Reach


def emit_masks(
    edit: Editor, reaches: Iterable[Reach], index: fx.Node, groups: fx.Node | None = None
) -> dict[Reach, fx.Node]:
    """A mask ``[1 or B, 1, S, S]`` for each reach of a sequence of its own.

    Args:
        edit: where.
        reaches: what its tokens see.
        index: of its tokens, ``[1, S]`` int64.
        groups: of its tokens, ``[B, S]`` int64; 0 for none. Only for reaches that ask for them.
    """
    return {reach: emit_mask(edit, reach, index, index, groups=groups) for reach in dict.fromkeys(reaches)}


def emit_mask(
    edit: Editor,
    reach: Reach,
    keys: fx.Node,
    queries: fx.Node,
    earlier: fx.Node | None = None,
    groups: fx.Node | None = None,
) -> fx.Node:
    """Which keys each query sees, ``[B, 1, Q, K]`` bool.

    Args:
        edit: where.
        reach: of the queries.
        keys: index of each key among the tokens of its row, ``[B, K]`` int64.
        queries: that of each query, ``[B, Q]`` int64.
        earlier: which keys are tokens up to each query, as the result; None if their indices tell.
        groups: of keys and queries, which are the same tokens, ``[B, S]`` int64; 0 for none.
    """
    own, other = _unsqueeze(edit, queries, 1, 3), _unsqueeze(edit, keys, 1, 2)
    seen = edit.call(aten.le.Tensor, other, own) if earlier is None else earlier
    if reach.groups and groups is not None:
        others, own_group = _unsqueeze(edit, groups, 1, 2), _unsqueeze(edit, groups, 1, 3)
        same = edit.call(aten.eq.Tensor, others, own_group)
        same = edit.call(aten.logical_and.default, same, edit.call(aten.gt.Scalar, others, 0))
        seen = edit.call(aten.logical_or.default, seen, same)
    if reach.chunk is not None:
        chunks = (edit.call(aten.floor_divide.default, each, reach.chunk) for each in (other, own))
        seen = edit.call(aten.logical_and.default, seen, edit.call(aten.eq.Tensor, *chunks))
    if reach.window is not None:
        behind = edit.call(aten.sub.Tensor, own, reach.window)
        seen = edit.call(aten.logical_and.default, seen, edit.call(aten.gt.Tensor, other, behind))
    return seen


def _unsqueeze(edit: Editor, node: fx.Node, *dims: int) -> fx.Node:
    for dim in dims:
        node = edit.call(aten.unsqueeze.default, node, dim)
    return node
