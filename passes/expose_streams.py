"""Make the residual stream before each layer an output, with all S rows.

Before: ``return (%hidden, ...)``
After:  ``return (%hidden, ..., stream.0, ..., stream.31)``, each ``[B, S, d]``. Rows that were deferred
        or deleted are as they were when they last ran.

The streams inside stages are those that `RouteStages` kept; where nothing was routed they are there already.
"""

from .base_pass import Pass, PassResult
from .model_graph import ModelGraph
from .tensor_names import output_name


class ExposeStreams(Pass):
    requires = ("layers",)
    provides = ("streams",)
    excludes = ("streams",)

    def apply(self, graph: ModelGraph) -> PassResult:
        streams = graph.streams or tuple(layer.start for layer in graph.layers)
        graph.outputs |= {output_name("stream", index): stream for index, stream in enumerate(streams)}
        output = graph.fx_graph.output_node()
        output.args = ((*output.args[0], *streams),)  # type: ignore[misc]
        return PassResult(self.name, matched=len(streams), rewritten=1)
