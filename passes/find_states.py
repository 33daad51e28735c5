"""Find the states of a vision tower: what enters its first layer and what leaves each layer.

Before: a flat graph whose nodes carry ``meta["region"] = "layer.<index>"``, as the capture names them.
After:  the same graph; `ModelGraph.states` holds them, which keeps layers alive that only a reduction reads.
"""

from torch import fx

from .base_errors import MatchError
from .base_pass import Pass, PassResult
from .graph_edit import is_tensor, shape
from .model_graph import ModelGraph


class FindStates(Pass):
    """Args:
    num_layers: layers of the tower.
    """

    provides = ("states",)
    excludes = ("reduced features",)

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers

    def apply(self, graph: ModelGraph) -> PassResult:
        inside: dict[str, list[fx.Node]] = {}
        for node in graph.fx_graph.nodes:
            region = str(node.meta.get("region", ""))
            if region.startswith("layer.") and is_tensor(node):
                inside.setdefault(region, []).append(node)
        if len(inside) != self.num_layers:
            raise MatchError(
                f"{len(inside)} layers of the vision tower were found; expected {self.num_layers}."
            )
        layers = list(inside.values())
        states = [_entering(graph, layers[0]), *(nodes[-1] for nodes in layers)]
        shapes = {str(shape(state)) for state in states}
        if len(shapes) != 1:
            raise MatchError(
                f"What leaves the layers of the vision tower has shapes {sorted(shapes)}; expected one."
            )
        graph.states = tuple(states)
        return PassResult(self.name, matched=len(layers))


def _entering(graph: ModelGraph, layer: list[fx.Node]) -> fx.Node:
    read = (node for inner in layer for node in inner.all_input_nodes)
    return next(n for n in read if n not in layer and n.name not in graph.parameters and is_tensor(n))
