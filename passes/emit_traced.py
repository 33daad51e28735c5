"""Emit what a plain function of tensors computes.

The function is traced on the fake values of its arguments, so the nodes have symbolic sizes as the graph has.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx

from .base_errors import MatchError
from .graph_edit import Editor, is_tensor, value

_SIZES = (2, 3, 5, 64, 97, 1009)
"""Sizes at which what a function takes for granted of its arguments has to hold."""


def emit(
    edit: Editor, name: str, function: Callable[..., Any], arguments: Mapping[str, Any]
) -> list[fx.Node]:
    """The nodes of a function, emitted at the place of `edit`.

    Args:
        edit: where.
        name: of the function, for messages.
        function: takes its arguments by keyword and returns one tensor or several.
        arguments: nodes, sequences of nodes, and values that are the same in every call.

    Returns:
        A node for each tensor.

    Raises:
        MatchError: the function can't be traced, depends on data or on special sizes, or brings tensors of its own.
    """
    leaves, structure = pytree.tree_flatten(dict(arguments))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, fx.Node)]

    def call(*tensors: torch.Tensor) -> Any:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        return function(**pytree.tree_unflatten(filled, structure))

    nodes = [leaves[place] for place in places]
    env = edit.graph.fake_mode.shape_env
    assert env is not None
    earlier = len(env.guards)
    try:
        with edit.graph.fake_mode, enable_python_dispatcher(), torch.no_grad():
            traced = make_fx(call, tracing_mode="symbolic")(*map(value, nodes))
    except Exception as error:
        raise MatchError(
            f"{name} can't be traced: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}. "
            f"Expected plain tensor operations, without choices that depend on data."
        ) from error
    choices = [guard.expr for guard in env.guards[earlier:] if not _holds_for_all_sizes(guard.expr)]
    if choices:
        raise MatchError(
            f"{name} chooses by the sizes of its arguments ({choices[0]}); expected the same operations for all sizes."
        )
    return _copy(edit, name, traced.graph, nodes)


def _holds_for_all_sizes(condition: Any) -> bool:
    symbols = sorted(condition.free_symbols, key=str)
    shifted = ({s: _SIZES[(i + k) % len(_SIZES)] for i, s in enumerate(symbols)} for k in range(len(_SIZES)))
    return all(bool(condition.subs(sizes)) for sizes in shifted)


def _copy(edit: Editor, name: str, graph: fx.Graph, arguments: list[fx.Node]) -> list[fx.Node]:
    copies: dict[fx.Node, Any] = dict(zip(graph.find_nodes(op="placeholder"), arguments, strict=True))
    for node in graph.nodes:
        if node.op == "get_attr":
            raise MatchError(
                f"{name} brings a tensor of its own; expected all tensors to be computed from its arguments, with "
                f"torch.arange or torch.full_like for numbers."
            )
        if node.op == "call_function":
            copies[node] = edit.copy(node, copies.__getitem__)
    results = pytree.tree_leaves(graph.output_node().args[0])
    if not all(isinstance(result, fx.Node) and is_tensor(copies[result]) for result in results):
        raise MatchError(f"{name} returned {results}; expected tensors.")
    return [copies[result] for result in results]
