"""Emit what a plain function of tensors computes.

The function is traced on the fake values of its arguments, so the nodes have symbolic sizes as the graph has.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx

from .base_errors import MatchError
from .graph_edit import Editor, expression, is_tensor, value

_SIZES = (2, 3, 5, 64, 97, 1009)
"""Sizes at which what a function takes for granted of its arguments has to hold."""


@dataclass(frozen=True, eq=False)
class Later:
    """An argument that is made only if the function uses it.

    Attributes:
        fake: its value, without data.
        make: emits its node.
    """

    fake: torch.Tensor
    make: Callable[[], fx.Node]


def emit(
    edit: Editor, name: str, function: Callable[..., Any], arguments: Mapping[str, Any]
) -> list[fx.Node]:
    """The nodes of a function, emitted at the place of `edit`.

    Args:
        edit: where.
        name: of the function, for messages.
        function: takes its arguments by keyword and returns one tensor or several.
        arguments: nodes, sequences of nodes, what is made `Later`, and values that are the same in every call.

    Returns:
        A node for each tensor.

    Raises:
        MatchError: the function can't be traced, depends on data or on special sizes, or brings tensors of its own.
    """
    leaves, structure = pytree.tree_flatten(dict(arguments))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, (fx.Node, Later))]
    # Sizes are read from the first tensor that has them: of those that are there anyway, if one has.
    places.sort(key=lambda place: isinstance(leaves[place], Later))

    def call(*tensors: torch.Tensor) -> Any:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        return function(**pytree.tree_unflatten(filled, structure))

    given = [leaves[place] for place in places]
    traced = _trace(edit, name, call, [*map(_fake, given)])
    used = [bool(placeholder.users) for placeholder in traced.find_nodes(op="placeholder")]
    made = [
        each.make() if isinstance(each, Later) and is_used else each
        for each, is_used in zip(given, used, strict=True)
    ]
    if not all(map(_lie_alike, given, made)):
        traced = _trace(edit, name, call, [*map(_fake, made)])
    return _copy(edit, name, traced, made)


def _fake(argument: fx.Node | Later) -> torch.Tensor:
    fake: torch.Tensor = argument.fake if isinstance(argument, Later) else value(argument)
    return fake


def _lie_alike(argument: fx.Node | Later, made: fx.Node | Later) -> bool:
    """Whether what was made lies in memory as it was expected to."""
    expected, found = _fake(argument), _fake(made)
    return all(
        size == 1 or expression(before) == expression(after)
        for size, before, after in zip(
            map(expression, found.shape), expected.stride(), found.stride(), strict=True
        )
    )


def _trace(edit: Editor, name: str, function: Callable[..., Any], fakes: Sequence[torch.Tensor]) -> fx.Graph:
    """The graph of a function, less what its results don't need.

    Raises:
        MatchError: see `emit`.
    """
    env = edit.graph.fake_mode.shape_env
    assert env is not None
    earlier = len(env.guards)
    try:
        with edit.graph.fake_mode, enable_python_dispatcher(), torch.no_grad():
            traced = make_fx(function, tracing_mode="symbolic")(*fakes)
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
    traced.graph.eliminate_dead_code()
    graph: fx.Graph = traced.graph
    return graph


def _holds_for_all_sizes(condition: Any) -> bool:
    symbols = sorted(condition.free_symbols, key=str)
    shifted = ({s: _SIZES[(i + k) % len(_SIZES)] for i, s in enumerate(symbols)} for k in range(len(_SIZES)))
    return all(bool(condition.subs(sizes)) for sizes in shifted)


def _copy(edit: Editor, name: str, graph: fx.Graph, arguments: Sequence[Any]) -> list[fx.Node]:
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
