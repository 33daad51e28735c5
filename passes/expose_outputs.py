"""Make what the runtime needs an output: keys and values of each layer, scores, selections and token indices.

Before: ``return (%hidden,)``
After:  ``return (%hidden, key.0, value.0, ..., scores.7, kept.7, ...)``; the names are in
        `ModelGraph.outputs`. Keys are rotated, [B, Hkv, S', D], with the rows that ran through
        the layer. ``index.7 [B, S']`` of a stage with windows says which tokens of the prompt these are.
"""

from .base_errors import MatchError
from .base_pass import Pass, PassResult
from .canonicalize_attention import attention_arguments, attentions
from .model_graph import ModelGraph
from .tensor_names import output_name


class ExposeOutputs(Pass):
    requires = ("layers",)
    provides = ("outputs",)
    excludes = ("outputs", "caches")

    def apply(self, graph: ModelGraph) -> PassResult:
        blocks = list(attentions(graph))
        if len(blocks) != len(graph.layers):
            raise MatchError(
                f"The graph has {len(blocks)} attentions for {len(graph.layers)} layers; expected one for each. What a "
                f"pass replaced is still read. This is a bug of reroute_fx; please report it."
            )
        for layer, node in enumerate(blocks):
            given = attention_arguments(node)
            graph.outputs[output_name("key", layer)] = given.key
            graph.outputs[output_name("value", layer)] = given.value
        for stage, index in graph.stage_indices.items():
            graph.outputs[output_name("index", stage)] = index
        for decision in graph.decisions:
            graph.outputs[output_name("scores", decision.layer)] = decision.scores
            graph.outputs[output_name("kept", decision.layer)] = decision.kept
        output = graph.fx_graph.output_node()
        output.args = ((*output.args[0], *graph.outputs.values()),)  # type: ignore[misc]
        return PassResult(self.name, matched=len(graph.outputs), rewritten=1)
