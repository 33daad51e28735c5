"""Write a stage's rows into the residual stream itself where nothing else needs the old stream.

Before: ``%new = reroute.restore_tokens(%stream, %rows, %positions)``, later readers of %new
After:  ``reroute.restore_tokens_(%stream, %rows, %positions)``, later readers of %stream

S' rows are written instead of S. A stream that is an input of the graph, that may share memory with another
value, that is read again after the restore, or that is kept for `ExposeStreams` is left alone.
"""

import operator
from collections.abc import Iterator, Sequence

import torch
from torch import fx

from .base_pass import Pass, PassResult, Rejection
from .graph_edit import edit_after
from .memory import may_share_memory
from .model_graph import ModelGraph

restore = torch.ops.reroute.restore_tokens.default
restore_ = torch.ops.reroute.restore_tokens_.default


class RestoreInPlace(Pass):
    requires = ("stages",)

    def apply(self, graph: ModelGraph) -> PassResult:
        restores = graph.fx_graph.find_nodes(op="call_function", target=restore)
        rejected = []
        for node in restores:
            reason = next(_what_forbids(node, graph.streams), None)
            if reason:
                rejected.append(Rejection(node.name, reason))
            else:
                _write_in_place(graph, node)
        found = len(restores)
        return PassResult(self.name, found, found - len(rejected), tuple(rejected))


def _what_forbids(node: fx.Node, kept: Sequence[fx.Node]) -> Iterator[str]:
    stream: fx.Node = node.args[0]  # type: ignore[assignment]
    if stream in kept or node in kept:
        yield f"%{stream.name if stream in kept else node.name} is kept"
    if stream.op != "call_function":
        yield f"%{stream.name} is an input"
    elif may_share_memory(_maker(stream)):
        yield f"%{stream.name} may share memory with what it was made from ({_maker(stream).target})"
    for user in stream.users:
        if user > node:
            yield f"%{stream.name} is read again by %{user.name}"
        elif user is not node and may_share_memory(user):
            yield f"%{user.name} may share memory with %{stream.name}"


def _maker(node: fx.Node) -> fx.Node:
    """The call that made a value, seen through the choice of one of several results."""
    return node.all_input_nodes[0] if node.target is operator.getitem else node


def _write_in_place(graph: ModelGraph, node: fx.Node) -> None:
    stream = node.args[0]
    with edit_after(graph, node, region=node.meta.get("region", "")) as edit:
        edit.call(restore_, *node.args)
    node.replace_all_uses_with(stream)  # type: ignore[arg-type]
    graph.fx_graph.erase_node(node)
