"""Route an exported decoder: the pipeline of passes on its own."""

from torch.export import ExportedProgram

from .config import RoutingConfig
from .passes import (
    CanonicalizeAttention,
    DecoderGraph,
    ExposeOutputs,
    FindLayers,
    InsertSelection,
    Pass,
    PassResult,
    ProveCausal,
    RemoveNoOps,
    RouteStages,
    run_passes,
    to_program,
)
from .report import RoutingReport
from .theory import LayerCost


def route(
    exported_program: ExportedProgram, config: RoutingConfig, *, num_layers: int | None = None
) -> tuple[ExportedProgram, RoutingReport]:
    """Rewrite an exported text decoder so that it runs on routed visual tokens.

    Args:
        exported_program: a decoder as `torch.export.export` returns it, from embeddings or token ids
            ``[B, S, ...]`` to hidden states ``[B, S, d]``, with symbolic B and S and without a cache. It is
            not changed, and its parameters are shared.
        config: what to route.
        num_layers: layers that the decoder has, if known: finding another number is then an error.

    Returns:
        The routed program and its report. The program takes the inputs of `exported_program`, less a
        padding mask, and ``visual_index [B, N]`` int64, the ascending positions of the visual tokens. It
        holds for rows of equal N without padding whose last token is a text token. It returns
        ``{"output": ..., "routing": ...}``: what the original returns, and a dictionary with
        ``key.<layer>`` and ``value.<layer>`` ``[B, Hkv, S', D]``, ``scores.<layer>`` ``[B, pool]`` float32
        and ``selected.<layer>`` ``[B, k]`` int64. Rows that were deferred or deleted keep the hidden state
        with which they left.

    Raises:
        ConfigError: a decision layer beyond the decoder.
        MatchError: the graph is no decoder that can be routed; the message names the nearest miss.
    """
    if num_layers is not None:
        config.check_depth(num_layers)
    passes = [
        *find_passes(num_layers),
        InsertSelection(config.decision_layers, config.keep_ratios),
        RouteStages(config.action),
        ExposeOutputs(),
    ]
    graph, results = run_passes(exported_program, passes)
    report = make_report(graph, results, config)
    return to_program(graph, exported_program), report


def find_passes(num_layers: int | None) -> list[Pass]:
    """The passes that find the decoder's layers and change nothing about what it computes."""
    return [RemoveNoOps(), CanonicalizeAttention(), ProveCausal(), FindLayers(num_layers)]


def make_report(graph: DecoderGraph, results: tuple[PassResult, ...], config: RoutingConfig) -> RoutingReport:
    layers = tuple(LayerCost.of(layer.sizes) for layer in graph.layers)
    stream = graph.layers[0].start.meta["val"]
    return RoutingReport(config, results, layers, stream.element_size())


def unrouted(exported_program: ExportedProgram, num_layers: int | None = None) -> ExportedProgram:
    """The program as `route` returns it, without routing: the baseline on the same compiler."""
    graph, _ = run_passes(exported_program, [*find_passes(num_layers), ExposeOutputs()])
    return to_program(graph, exported_program)
