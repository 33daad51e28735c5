"""Give the layers of each stage rotary positions of their own, in the program for tokens that follow a prompt.

Before: ``%cos = cos(f(%position_ids))``, read by all layers
After:  ``%cos`` for the layers before the first stage, ``%cos_7 = cos(f(%position_ids_7))`` for those from 7 to the
        next stage, and so on

Where positions are contiguous, a stage's next token has the position after that stage's tokens. Inputs that are
added: ``position_ids_7``, shaped as ``position_ids``, for each stage but the first.
"""

from collections.abc import Sequence

from torch import fx

from .base_errors import MatchError
from .base_pass import Pass, PassResult
from .graph_edit import add_input, ancestors, descendants, edit_after, shape, value
from .model_graph import Layer, ModelGraph
from .replay import sequence_inputs
from .tensor_names import POSITION_IDS, positions_input


class NumberStages(Pass):
    """Args:
    stage_starts: first layers of the stages, ascending; the layers before the first keep the input that is there.
    """

    requires = ("layers",)
    provides = ("numbered stages",)
    excludes = ("numbered stages", "decisions", "caches")

    def __init__(self, stage_starts: Sequence[int]) -> None:
        self.stage_starts = tuple(stage_starts)

    def apply(self, graph: ModelGraph) -> PassResult:
        given = position_input(graph)
        ends = (*self.stage_starts[1:], len(graph.layers))
        if any(start >= end for start, end in zip(self.stage_starts, ends, strict=True)):
            raise MatchError(
                f"stage_starts is {list(self.stage_starts)}, but the graph has {len(graph.layers)} layers; expected "
                f"ascending layers that it has."
            )
        order = {node: place for place, node in enumerate(graph.fx_graph.nodes)}
        from_positions = descendants(given)
        for start, end in zip(self.stage_starts, ends, strict=True):
            own = add_input(graph, positions_input(start), shape(given), value(given).dtype)
            stage = graph.layers[start:end]
            read = [tensor for tensor in sequence_inputs(stage) if tensor in from_positions]
            computed = sorted(ancestors(read) & from_positions - {given}, key=order.__getitem__)
            with edit_after(graph, computed[-1] if computed else own, f"positions.{start}") as edit:
                copies = edit.copy_all(computed, {given: own})
            for layer in stage:
                _read_instead(layer, copies)
        return PassResult(self.name, matched=len(self.stage_starts), rewritten=len(self.stage_starts))


def position_input(graph: ModelGraph) -> fx.Node:
    """The input that holds rotary positions."""
    for node in graph.inputs:
        if node.name == POSITION_IDS:
            return node
    raise MatchError(
        f"The graph has no input {POSITION_IDS!r}, only {[node.name for node in graph.inputs]}; expected one, whose "
        f"positions can be counted anew."
    )


def _read_instead(layer: Layer, copies: dict[fx.Node, fx.Node]) -> None:
    for node in layer.nodes:
        for source in node.all_input_nodes:
            if source in copies:
                node.replace_input_with(source, copies[source])
