"""Route an exported decoder: the pipeline of passes on its own."""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from torch.export import ExportedProgram

from .analysis.routing_report import RoutingReport
from .analysis.theory import LayerCost
from .capture.captured_decoder import CapturedDecoder
from .capture.image_layout import AnyImages, FixedImages, GridImages
from .capture.structure import with_weights_of
from .capture.vision_tower import CapturedTower
from .common.collecting import without_collecting
from .config.choosing import read_config
from .config.routing_config import RoutingConfig
from .config.savings import Savings
from .passes import (
    DUMP_VARIABLE,
    AttendToCache,
    CanonicalizeAttention,
    CarryStates,
    ExposeOutputs,
    ExposeStreams,
    FindLayers,
    FindStates,
    FoldHeads,
    GridInputs,
    InsertSelection,
    ModelGraph,
    NumberStages,
    Pass,
    PassResult,
    PoolBlocks,
    ProveCausal,
    ReduceFeatures,
    ReduceGrids,
    RemoveNoOps,
    RestoreInPlace,
    RouteStages,
    SeeGroups,
    WriteOutComplex,
    edit_graph,
    run_passes,
    to_program,
)
from .passes.graph_edit import value
from .passes.shared_caches import sources


def route(
    exported_program: ExportedProgram,
    config: RoutingConfig | str | Path,
    *,
    num_layers: int | None = None,
    savings: Savings | None = None,
    streams: bool = False,
) -> tuple[ExportedProgram, RoutingReport]:
    """Rewrite an exported text decoder so that it runs on routed visual tokens.

    Args:
        exported_program: a decoder as `torch.export.export` returns it, from embeddings or token ids
            ``[B, S, ...]`` to hidden states ``[B, S, d]``, with symbolic B and S and without a cache. It is
            not changed, and its parameters are shared.
        config: what to route, or the path of a JSON file that `RoutingConfig.save` wrote.
        num_layers: layers that the decoder has, if known: finding another number is then an error.
        savings: rewrites that save work; None for those that were measured to pay.
        streams: return the residual stream before each layer as well.

    Returns:
        The routed program and its report. The program takes the inputs of `exported_program`, less a
        padding mask, and what `RowPlan.inputs` holds. Shorter rows are padded at their end; the last token
        of each row is a text token. The program returns ``{"output": ..., "routing": ...}``: what the
        original returns, and a dictionary with ``key.<layer>`` and ``value.<layer>`` ``[B, Hkv, S', D]``,
        ``scores.<layer>`` ``[B, N]`` float32 (-inf for tokens that were no candidates) and
        ``kept.<layer>`` ``[B, N]`` bool, with `streams` also ``stream.<layer>`` ``[B, S, d]``. Tokens that were
        deferred or deleted keep the hidden state with which they left.

    Raises:
        ConfigError: a decision layer beyond the decoder, or a file that holds no configuration.
        MatchError: the graph is no decoder that can be routed; the message names the nearest miss.
    """
    config = read_config(config)
    if num_layers is not None:
        config.check_depth(num_layers)
    graph, found = run_passes(exported_program, find_passes(num_layers))
    results = edit_graph(graph, _prompt_passes(config, savings or Savings(), streams))
    return to_program(graph, exported_program), make_report(graph, (*found, *results), config)


def _prompt_passes(
    config: RoutingConfig, savings: Savings, streams: bool, groups: tuple[int, ...] = ()
) -> list[Pass]:
    stages = _stage_passes(config, savings, streams)
    return [
        *([SeeGroups(groups)] if groups else []),
        *stages,
        CarryStates(),
        ExposeOutputs(),
        *_stream_passes(streams),
    ]


def _stream_passes(streams: bool) -> list[Pass]:
    return [ExposeStreams()] if streams else []


def _stage_passes(config: RoutingConfig, savings: Savings, keep_streams: bool) -> list[Pass]:
    if not config.decision_layers:
        return []
    return [
        *([PoolBlocks()] if config.block else []),
        InsertSelection(
            config.decision_layers,
            several_pools=config.pool == "image",
            ranks=config.ranks,
            scoring=config.scoring_layers,
            seed=config.seed,
            always=config.block_decisions,
        ),
        RouteStages(config.action, config.positions, keep_streams),
        *([RestoreInPlace()] if savings.restore_in_place else []),
    ]


def reduce_tower(tower: CapturedTower, layers: int, config: RoutingConfig) -> CapturedTower:
    """A vision tower of so many layers, of which the features are reduced as the method of `config` says.

    Its program returns features of all patches still, rows of -inf for those that are gone.
    """
    passes = [FindStates(layers), CanonicalizeAttention(), _reduction_pass(tower.images, config)]
    graph, _ = run_passes(tower.program, passes)
    images = (
        replace(tower.images, share=config.entry_ratio)
        if isinstance(tower.images, GridImages)
        else tower.images
    )
    return CapturedTower(to_program(graph, tower.program, as_original=True), images)


def _reduction_pass(images: AnyImages, config: RoutingConfig) -> Pass:
    method = config.definition
    if isinstance(images, FixedImages):
        assert method.reduction is not None
        return ReduceFeatures(method.reduction.reduce, images.tokens, config.entering(images.tokens))
    assert method.grids is not None
    assert isinstance(images, GridImages)
    order = "window_order" if images.window is not None else None
    inputs = GridInputs("frames", "position_ids", order, "feature_frames", "feature_counts")
    return ReduceGrids(method.grids.reduce, config.entry_ratio, method.grids.compared, images.merge, inputs)


def find_passes(num_layers: int | None) -> list[Pass]:
    """The passes that find the decoder's layers and change nothing about what it computes."""
    return [
        RemoveNoOps(),
        WriteOutComplex(),
        CanonicalizeAttention(),
        ProveCausal(),
        FindLayers(num_layers),
    ]


def make_report(graph: ModelGraph, results: tuple[PassResult, ...], config: RoutingConfig) -> RoutingReport:
    layers = tuple(LayerCost.of(layer.sizes) for layer in graph.layers)
    stream = graph.layers[0].start.meta["val"]
    return RoutingReport(
        config,
        results,
        layers,
        stream.element_size(),
        reaches=graph.reaches,
        sources=sources(graph.layers),
    )


def continuation(
    exported_program: ExportedProgram,
    stage_starts: Sequence[int] = (),
    num_layers: int | None = None,
    *,
    positions: str = "original",
    streams: bool = False,
) -> ExportedProgram:
    """The program for tokens that follow a prompt: each layer attends to its own key-value cache.

    Args:
        exported_program: as for `route`.
        stage_starts: decision layers; the layers from one to the next cached the same tokens.
        num_layers: layers that the decoder has, if known.
        positions: see `RoutingConfig`.
        streams: see `route`.

    Returns:
        A program that takes the inputs of `exported_program` for Q new tokens, less a padding mask, and those
        that `AttendToCache` adds, and `NumberStages` for contiguous positions. It writes into the caches.

    Raises:
        MatchError: the graph is no decoder that can be routed.
    """
    graph, _ = run_passes(exported_program, find_passes(num_layers))
    edit_graph(graph, _following_passes(graph, stage_starts, positions, streams))
    return to_program(graph, exported_program)


def _following_passes(
    graph: ModelGraph, stage_starts: Sequence[int], positions: str, streams: bool
) -> list[Pass]:
    numbering: list[Pass] = [NumberStages(stage_starts)] if positions == "contiguous" else []
    # The fused kernel for CPUs takes groups and a mask: folding saves nothing there, and costs a larger mask.
    folding: list[Pass] = [FoldHeads()] if value(graph.inputs[0]).device.type == "cuda" else []
    return [*numbering, AttendToCache(stage_starts), *folding, *_stream_passes(streams)]


def unrouted(exported_program: ExportedProgram, num_layers: int | None = None) -> ExportedProgram:
    """The program as `route` returns it, without routing: the baseline on the same compiler."""
    graph, _ = run_passes(exported_program, [*find_passes(num_layers), CarryStates(), ExposeOutputs()])
    return to_program(graph, exported_program)


class DecoderPrograms:
    """Programs of a captured decoder. Its layers are found once, and the programs that were asked for last are kept.

    Decoders that are alike have the programs in common, each on its own weights.
    """

    def __init__(self, captured: CapturedDecoder) -> None:
        self._captured = captured
        is_alone = captured.trace is captured.program or os.environ.get(DUMP_VARIABLE)
        make = _Programs if is_alone else _programs
        self._made = make(captured.trace, captured.num_layers)

    def prompt(
        self, config: RoutingConfig, savings: Savings | None = None, *, streams: bool = False
    ) -> tuple[ExportedProgram, RoutingReport]:
        """See `route`."""
        config.check_depth(self._captured.num_layers)
        # Configurations are equal by the names of their methods, which don't say what the methods are. As long as one
        # is kept its method is, so that no other has its number.
        method = id(config.definition) if config.decision_layers and not config.rules else 0
        groups = self._captured.grouped_layers
        program, report = self._made.prompt(config, method, savings or Savings(), streams, groups)
        return with_weights_of(program, self._captured.program), report

    def following(self, config: RoutingConfig, *, streams: bool = False) -> ExportedProgram:
        """See `continuation`."""
        program = self._made.following(config.decision_layers, config.positions, streams)
        return with_weights_of(program, self._captured.program)


class _Programs:
    """Programs that are made of one trace."""

    def __init__(self, trace: ExportedProgram, num_layers: int) -> None:
        self._trace = trace
        self._graph, self._found = run_passes(trace, find_passes(num_layers))
        self.prompt = lru_cache(_KEPT)(self._prompt)
        self.following = lru_cache(_KEPT)(self._following)

    @without_collecting()
    def _prompt(
        self, config: RoutingConfig, method: int, savings: Savings, streams: bool, groups: tuple[int, ...]
    ) -> tuple[ExportedProgram, RoutingReport]:
        graph = self._graph.copy()
        results = edit_graph(graph, _prompt_passes(config, savings, streams, groups))
        return to_program(graph, self._trace), make_report(graph, (*self._found, *results), config)

    @without_collecting()
    def _following(self, stage_starts: tuple[int, ...], positions: str, streams: bool) -> ExportedProgram:
        graph = self._graph.copy()
        edit_graph(graph, _following_passes(graph, stage_starts, positions, streams))
        return to_program(graph, self._trace)


_KEPT = 8
_programs = lru_cache(_KEPT)(_Programs)
