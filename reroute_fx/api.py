"""The front door: `compile` a model."""

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.export import ExportedProgram

from ._compat import settle_cpu_math
from .analysis.routing_report import RoutingReport
from .capture import CapturedDecoder, capture_decoder, find_visual_token_ids, text_decoder
from .capture.cells import has_cells
from .capture.layer_configs import layer_config
from .capture.vision_tower import capture_vision_tower, tower_facts
from .capture.visual_tokens import has_grids
from .capture.wrappers import unwrap
from .common.turns import one_at_a_time
from .config.choosing import choose_config
from .config.limits import Limits
from .config.routing_config import RoutingConfig
from .config.savings import Savings
from .errors import ConfigError, UnsupportedModelError
from .lowering import (
    CudaRecorder,
    Executable,
    TensorRTProgram,
    ask_early,
    check_backend,
    check_device,
    check_tensorrt,
    describe_operators,
    lower,
)
from .methods import Method
from .passes import fields_asked
from .passes.tensor_names import CELLS
from .pipeline import DecoderPrograms, reduce_tower
from .runtime import RoutedModel, make_routed_model

logger = logging.getLogger(__name__)


@one_at_a_time
def compile(
    model: torch.nn.Module,
    tier: float | None = None,
    *,
    config: RoutingConfig | str | Path | None = None,
    method: str | Method | None = None,
    action: str | None = None,
    schedule: str | None = None,
    pool: str | None = None,
    backend: str = "inductor",
    dynamic: bool = True,
    savings: Savings | None = None,
    cuda_graphs: bool = False,
    limits: Limits | None = None,
    progress: bool = False,
) -> RoutedModel:
    """Route the visual tokens of a Hugging Face vision-language model.

    Threads may call it, and the models that it returns; they take turns.

    Args:
        model: in eval mode, on one device. It is not changed; the result shares its parameters. Of a `PeftModel` the
            base model is taken, with the adapters in its layers.
        tier: average number of visual tokens (of 576) that enter a decoder layer: 192, 128, 64, or the share
            kept as a float in (0, 1]; None for 128, or what the authors of an ``-official`` method run.
        config: decision layers and ratios spelled out, or the path of a JSON file that `RoutingConfig.save` or `tune`
            wrote, instead of `tier`, `method`, `action`, `schedule` and `pool`.
        method: how tokens are chosen: ``"pdrop"``, the default, ``"fastv"``, another that `reroute-fx methods` lists,
            or one of your own: a `Method`, or the name of one that `register_method` was given. ``"none"`` compiles
            without routing, the baseline of a comparison.
        action: ``"compact_route_stagewise"``, the default, ``"compact_route"`` or ``"physical_delete"``.
        schedule: ``"exact"``, the default, keeps the tier's promise; ``"paper"`` takes the released ratios.
        pool: ``"row"``, the default, lets all visual tokens of a prompt compete, ``"image"`` those of each image or
            video.
        backend: ``"inductor"``, ``"eager"`` or ``"tensorrt"``, which builds engines with Torch-TensorRT at once and is
            experimental: no engine of it was run on a GPU yet.
        dynamic: compile for any prompt length, number of visual tokens and batch size.
        savings: rewrites that save work and change no result; None for those that were measured to pay.
        cuda_graphs: replay prefills, in sizes rounded up to multiples of 64, and decoding steps as CUDA graphs.
        limits: the largest call, for ``"tensorrt"``; larger ones are refused.
        progress: show on the terminal what is going on, also while the first calls compile.

    Returns:
        A `RoutedModel` that is also an instance of the model's class.

    Raises:
        ConfigError, UnsupportedModelError, BackendUnavailableError: before anything is traced.
        CaptureError: the decoder can't be exported.
        MatchError: not every attention block of the decoder was found in a form that can be routed.
    """
    check_backend(backend)
    model, source = unwrap(model)
    decoder = text_decoder(model)
    if isinstance(model, RoutedModel):
        raise ConfigError("model is routed already; expected the original model. Compile that one again.")
    if model.training:
        raise UnsupportedModelError("model is in training mode; expected eval mode. Call model.eval() first.")
    if decoder.device.type == "meta":
        raise UnsupportedModelError(
            "model is on the meta device and has no weights; expected a loaded model. To see the report without "
            "weights use reroute_fx.inspect or `reroute-fx inspect`."
        )
    check_device(decoder.device, decoder.dtype)
    if backend == "tensorrt":
        limits = _tensorrt_limits(limits, dynamic, cuda_graphs)
        check_tensorrt(decoder.device)
    elif limits is not None:
        raise ConfigError(
            f"limits are given for backend {backend!r}, which takes calls of any size. Leave them out."
        )
    if cuda_graphs and decoder.device.type != "cuda":
        raise ConfigError(
            f"cuda_graphs is True, but the model is on {decoder.device}; expected a model on cuda. Leave it out."
        )
    config = _config(
        model, decoder, config, tier=tier, method=method, action=action, schedule=schedule, pool=pool
    )
    settle_cpu_math()
    if backend == "inductor":
        ask_early(decoder.device)
    with _status(progress, "capturing the decoder"):
        captured = capture_decoder(model)
    _check_positions(config, captured)
    with _status(progress, "routing"):
        programs = DecoderPrograms(captured)
        program, report = programs.prompt(config, savings)
        following = programs.following(config)

    def lowered(source: ExportedProgram, name: str) -> Executable | TensorRTProgram:
        return lower(
            source,
            backend,
            dynamic,
            name,
            recorder=CudaRecorder() if cuda_graphs else None,
            show_progress=progress,
            limits=limits,
        )

    def with_streams(name: str) -> Executable | TensorRTProgram:
        if name == "prefill":
            source, _ = programs.prompt(config, savings, streams=True)
        else:
            source = programs.following(config, streams=True)
        return lowered(source, f"{name} with hidden states")

    tower, images = None, None
    if config.entry_ratio < 1:
        with _status(progress, "reducing pictures"):
            layers = tower_facts(model.config).layers
            tower = reduce_tower(capture_vision_tower(model), layers, config)  # type: ignore[arg-type]
        # TensorRT has the decoder; the tower is compiled as everything around it.
        around = "inductor" if backend == "tensorrt" else backend
        images = lower(tower.program, around, dynamic, "images", show_progress=progress)
    report = replace(report, operators=describe_operators(decoder.device))
    return make_routed_model(
        model,  # type: ignore[arg-type]
        decoder,
        report=_named(report, model, source, backend, captured.seconds),
        position_rank=captured.position_rank,
        layer_features=captured.layer_features,
        token_inputs=captured.token_inputs,
        visual_ids=find_visual_token_ids(model.config),
        limits=limits,
        tower=tower,
        images=images,
        with_streams=with_streams,
        prefill=lowered(program, "prefill"),
        continuation=lowered(following, "continuation"),
    )


def _tensorrt_limits(limits: Limits | None, dynamic: bool, cuda_graphs: bool) -> Limits:
    for name, value, wanted in (("dynamic", dynamic, True), ("cuda_graphs", cuda_graphs, False)):
        if value is not wanted:
            raise ConfigError(f"{name} is {value}; expected {wanted} for backend 'tensorrt'. Leave it out.")
    if limits is not None and not isinstance(limits, Limits):
        raise ConfigError(f"limits is a {type(limits).__name__}; expected reroute_fx.Limits.")
    return limits or Limits()


def _status(show: bool, text: str) -> AbstractContextManager[Any]:
    return Console(stderr=True).status(text) if show else nullcontext()


@one_at_a_time
def inspect(
    model: torch.nn.Module,
    tier: float | None = None,
    *,
    config: RoutingConfig | str | Path | None = None,
    method: str | Method | None = None,
    action: str | None = None,
    schedule: str | None = None,
    pool: str | None = None,
) -> RoutingReport:
    """The report that `compile` would give, without compiling; `model` may be on the meta device.

    Args and errors are those of `compile`.
    """
    model, source = unwrap(model)
    decoder = text_decoder(model)
    config = _config(
        model, decoder, config, tier=tier, method=method, action=action, schedule=schedule, pool=pool
    )
    captured = capture_decoder(model)
    _check_positions(config, captured)
    _, report = DecoderPrograms(captured).prompt(config)
    return _named(report, model, source, "", captured.seconds)


def _config(
    model: Any, decoder: Any, config: RoutingConfig | str | Path | None, **choices: Any
) -> RoutingConfig:
    """The configuration that is asked for, which fits the model."""
    chosen = choose_config(config, model.config, grids=has_grids(model.config), **choices)
    _check_tower(model, chosen)
    check_rules(model, decoder, chosen)
    _check_block(model, chosen)
    return chosen


def _check_tower(model: Any, config: RoutingConfig) -> None:
    """Raise `UnsupportedModelError` unless the method's reduction fits the vision tower."""
    if config.entry_ratio == 1:
        return
    method, facts = config.definition, tower_facts(model.config)
    reason: str | None = "the tokens of its pictures depend on their sizes"
    if facts.tokens is not None and method.reduction:
        reason = method.reduction.check(facts.tokens, facts.layers, facts.has_cls)
    elif facts.grids and method.grids:
        reason = method.grids.check(facts.layers)
    if reason:
        raise UnsupportedModelError(
            f"method {config.method!r} doesn't fit {type(model).__name__}: {reason}. Use another method."
        )


def check_rules(model: Any, decoder: Any, config: RoutingConfig) -> None:
    """Raise unless the decoder has the heads that rules ask, and the model the rows and columns.

    Raises:
        ConfigError: a head that is not there.
        UnsupportedModelError: it is not known where visual tokens lie in their pictures.
    """
    for layer, rank in zip(config.decision_layers, config.ranks, strict=True):
        text = layer_config(decoder.config, layer)
        kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        asked = fields_asked(rank, text.num_attention_heads, kv_heads) & set(CELLS)
        if asked and not has_cells(model.config):
            raise UnsupportedModelError(
                f"The rule before layer {layer} ranks by {', '.join(sorted(asked))}, but where the visual tokens of "
                f"{type(model).__name__} lie in their pictures is not known; expected a model with one token for each "
                f"cell of a grid, such as LLaVA-1.5 or Qwen2.5-VL. Use a rule without a lattice."
            )


def _check_block(model: Any, config: RoutingConfig) -> None:
    """Raise `UnsupportedModelError` unless it is known where the visual tokens lie that form blocks."""
    if config.block and not has_cells(model.config):
        raise UnsupportedModelError(
            f"block is {config.block} (method {config.method!r}), but where the visual tokens of a "
            f"{type(model).__name__} lie in their pictures is not known; expected a model with one token for each cell "
            f"of a grid, such as LLaVA-1.5 or Qwen2.5-VL. Use a method without blocks, such as 'pdrop'."
        )


def _check_positions(config: RoutingConfig, captured: CapturedDecoder) -> None:
    if config.positions == "contiguous" and captured.position_rank != 2:
        raise UnsupportedModelError(
            f"positions is 'contiguous' (method {config.method!r}), but the decoder takes positions in time, height "
            f"and width; expected one number for each token. Use positions='original'."
        )


def _named(
    report: RoutingReport, model: torch.nn.Module, source: str, backend: str, capture_seconds: float
) -> RoutingReport:
    passes = sum(result.seconds for result in report.passes)
    seconds = {"capture": capture_seconds, "passes": passes}
    _log(report, type(model).__name__, seconds)
    return replace(report, model=type(model).__name__, source=source, backend=backend, seconds=seconds)


def _log(report: RoutingReport, model: str, seconds: dict[str, float]) -> None:
    for result in report.passes:
        logger.debug(
            "%s: %d matched, %d rewritten, %.2f s",
            result.name,
            result.matched,
            result.rewritten,
            result.seconds,
        )
    logger.info(
        "%s: captured in %.1f s; %d layers routed in %.1f s, %s / %s, on average %.1f of %d visual tokens in a layer",
        model,
        seconds["capture"],
        report.num_layers,
        seconds["passes"],
        report.config.method,
        report.config.action,
        report.average_tokens,
        report.visual_tokens,
    )
