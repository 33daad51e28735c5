"""Operators in which a token knows earlier ones by a state of fixed size: causal convolutions and linear attention.

Each returns its results and the state behind the last token, and takes ``state`` and ``lengths`` as its last arguments.
"""

import operator
from collections.abc import Iterable

import torch
from torch import fx

from .graph_edit import Editor, is_op, named_arguments

CONVOLUTION, SCAN = torch.ops.reroute.causal_convolution, torch.ops.reroute.gated_delta
RECURRENCES = (CONVOLUTION, SCAN)
_TOKENS = {CONVOLUTION: {"inputs": 2}, SCAN: dict.fromkeys(("query", "key", "value", "decay", "beta"), 1)}
"""The dimension that runs over tokens, of each argument that has one."""


def recurrences(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """In the order of `nodes`."""
    return [node for node in nodes if is_op(node, *RECURRENCES)]


def token_arguments(node: fx.Node) -> list[tuple[fx.Node, int]]:
    """Arguments that run over tokens, and the dimension in which they do."""
    given = named_arguments(node)
    dims = _TOKENS[node.target.overloadpacket]  # type: ignore[union-attr]
    return [(given[name], dim) for name, dim in dims.items()]


def carry(node: fx.Node, state: fx.Node | None, lengths: fx.Node) -> None:
    """Let a recurrence begin with a state and end with each row's last token."""
    node.kwargs = {**node.kwargs, "state": state, "lengths": lengths}


def state_behind(edit: Editor, node: fx.Node) -> fx.Node:
    """The state that a recurrence returns."""
    return edit.call(operator.getitem, node, 1)
