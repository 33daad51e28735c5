"""Make what the runtime needs an output: keys and values of each layer, scores, selections and token indices.

Before: ``return (%hidden,)``
After:  ``return (%hidden, key.0, value.0, ..., scores.7, kept.7, ...)``; the names are in
        `ModelGraph.outputs`. Keys are rotated, [B, Hkv, S', D], with the rows that ran through
        the layer. Of a layer with states these are ``key.3`` and ``value.3``, one for each of its recurrences.
        A layer that reads the cache of another one of its stage has none.
        ``index.7 [B, S']`` of a stage with windows says which tokens of the prompt these are.
"""

from torch import fx

from .base_errors import MatchError
from .base_pass import Pass, PassResult
from .canonicalize_attention import attention_arguments, attentions
from .graph_edit import edit_after
from .model_graph import ModelGraph
from .recurrences import recurrences, state_behind
from .shared_caches import cache_owners, sources
from .tensor_names import CACHED, output_name


class ExposeOutputs(Pass):
    requires = ("layers",)
    provides = ("outputs",)
    excludes = ("outputs", "caches")

    def apply(self, graph: ModelGraph) -> PassResult:
        blocks = list(attentions(graph))
        attending = [i for i, layer in enumerate(graph.layers) if not graph.reaches[layer.index].state]
        if len(blocks) != len(attending):
            raise MatchError(
                f"The graph has {len(blocks)} attentions for {len(attending)} layers; expected one for each. What a "
                f"pass replaced is still read. This is a bug of reroute_fx; please report it."
            )
        found: dict[int, tuple[fx.Node, ...]] = {}
        owners = cache_owners(sources(graph.layers), [decision.layer for decision in graph.decisions])
        for layer, node in zip(attending, blocks, strict=True):
            given = attention_arguments(node)
            if owners[layer] == layer:
                found[layer] = given.key, given.value
        found |= expose_states(graph)
        for layer in sorted(found):
            for kind, node in zip(CACHED, found[layer], strict=False):
                graph.outputs[output_name(kind, layer)] = node
        for stage, index in graph.stage_indices.items():
            graph.outputs[output_name("index", stage)] = index
        for decision in graph.decisions:
            graph.outputs[output_name("scores", decision.layer)] = decision.scores
            graph.outputs[output_name("kept", decision.layer)] = decision.kept
        output = graph.fx_graph.output_node()
        output.args = ((*output.args[0], *graph.outputs.values()),)  # type: ignore[misc]
        return PassResult(self.name, matched=len(graph.outputs), rewritten=1)


def expose_states(graph: ModelGraph) -> dict[int, tuple[fx.Node, ...]]:
    """Nodes that hold the states behind each layer that has some, in the order of its recurrences."""
    found: dict[int, tuple[fx.Node, ...]] = {}
    for node in recurrences(graph.fx_graph.nodes):
        region = node.meta["region"]
        with edit_after(graph, node, region=region) as edit:
            state = state_behind(edit, node)
        layer = int(region.removeprefix("layer."))
        found[layer] = (*found.get(layer, ()), state)
    return found
