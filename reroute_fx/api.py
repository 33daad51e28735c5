"""The front door: `compile` a model."""

from dataclasses import replace
from typing import Any

import torch

from ._compat import settle_cpu_math
from .capture import capture_decoder, find_visual_token_ids, text_decoder
from .config import RoutingConfig
from .errors import ConfigError, UnsupportedModelError
from .lowering import check_backend, lower
from .report import RoutingReport
from .routing import continuation, route
from .runtime import RoutedModel, make_routed_model


def compile(
    model: torch.nn.Module,
    tier: float = 128,
    *,
    config: RoutingConfig | None = None,
    method: str = "pdrop",
    action: str = "compact_route_stagewise",
    schedule: str = "exact",
    pool: str = "row",
    backend: str = "inductor",
    dynamic: bool = True,
) -> Any:
    """Route the visual tokens of a Hugging Face vision-language model.

    Args:
        model: in eval mode, on one device. It is not changed; the result shares its parameters.
        tier: average number of visual tokens (of 576) that enter a decoder layer: 192, 128, 64, or the share
            kept as a float in (0, 1].
        config: decision layers and ratios spelled out; `tier`, `method`, `action`, `schedule` and `pool` are
            then not used.
        method: ``"pdrop"`` or ``"fastv"``; ``"none"`` compiles without routing, the baseline of a comparison.
        action: ``"compact_route_stagewise"``, ``"compact_route"`` or ``"physical_delete"``.
        schedule: ``"exact"`` keeps the tier's promise, ``"paper"`` takes the released ratios.
        pool: ``"row"`` lets all visual tokens of a prompt compete, ``"image"`` those of each image or video.
        backend: ``"inductor"`` or ``"eager"``.
        dynamic: compile for any prompt length, number of visual tokens and batch size.

    Returns:
        A `RoutedModel` that is also an instance of the model's class.

    Raises:
        ConfigError, UnsupportedModelError: before anything is traced.
        CaptureError: the decoder can't be exported.
        MatchError: not every attention block of the decoder was found in a form that can be routed.
    """
    check_backend(backend)
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
    config = _config(decoder, tier, config, method, action, schedule, pool)
    settle_cpu_math()
    captured = capture_decoder(model)
    program, report = route(captured.program, config, num_layers=captured.num_layers)
    following = continuation(captured.program, config.decision_layers, captured.num_layers)
    return make_routed_model(
        model,  # type: ignore[arg-type]
        decoder,
        lower(program, backend, dynamic, name="prefill"),
        lower(following, backend, dynamic, name="continuation"),
        _named(report, model, backend, captured.seconds),
        position_rank=captured.position_rank,
        visual_ids=find_visual_token_ids(model.config),
    )


def inspect(
    model: torch.nn.Module,
    tier: float = 128,
    *,
    config: RoutingConfig | None = None,
    method: str = "pdrop",
    action: str = "compact_route_stagewise",
    schedule: str = "exact",
    pool: str = "row",
) -> RoutingReport:
    """The report that `compile` would give, without compiling; `model` may be on the meta device.

    Args and errors are those of `compile`.
    """
    config = _config(text_decoder(model), tier, config, method, action, schedule, pool)
    captured = capture_decoder(model)
    _, report = route(captured.program, config, num_layers=captured.num_layers)
    return _named(report, model, "", captured.seconds)


def _config(
    decoder: Any,
    tier: float,
    config: RoutingConfig | None,
    method: str,
    action: str,
    schedule: str,
    pool: str,
) -> RoutingConfig:
    num_layers = decoder.config.num_hidden_layers
    if config is None:
        return RoutingConfig.from_tier(tier, method, action, schedule, pool, num_layers=num_layers)
    if not isinstance(config, RoutingConfig):
        raise ConfigError(f"config is a {type(config).__name__}; expected a RoutingConfig.")
    config.check_depth(num_layers)
    return config


def _named(
    report: RoutingReport, model: torch.nn.Module, backend: str, capture_seconds: float
) -> RoutingReport:
    passes = sum(result.seconds for result in report.passes)
    seconds = {"capture": capture_seconds, "passes": passes}
    return replace(report, model=type(model).__name__, backend=backend, seconds=seconds)
