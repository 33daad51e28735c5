"""A routed model is put together: a copy that shares the model's weights, with programs for its decoder."""

import inspect
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..analysis.routing_report import RoutingReport
from ..capture import text_decoder
from ..capture.copies import copy_sharing_weights
from ..capture.fingerprint import Fingerprint
from ..capture.layer_features import LayerFeatures
from ..capture.token_inputs import TokenInput
from ..capture.vision_tower import CapturedTower
from ..config.limits import Limits
from ..errors import InputError
from ..lowering import Executable, TensorRTProgram
from ..passes import Reach
from ..selection.asked_inputs import asked_inputs
from .masks import UNNAMED
from .prompt import PromptReader
from .prompt_reduction import ReducedFeatures
from .routed_decoder import RoutedDecoder
from .routed_model import RoutedModel
from .specialize import specialize


def make_routed_model(
    model: PreTrainedModel,
    decoder: PreTrainedModel,
    prefill: Executable | TensorRTProgram,
    continuation: Executable | TensorRTProgram,
    report: RoutingReport,
    *,
    position_rank: int,
    layer_features: LayerFeatures | None = None,
    token_inputs: tuple[TokenInput, ...] = (),
    visual_ids: tuple[int, ...],
    limits: Limits | None = None,
    tower: CapturedTower | None = None,
    images: Executable | TensorRTProgram | None = None,
    with_streams: Callable[[str], Executable | TensorRTProgram] | None = None,
) -> RoutedModel:
    """A `RoutedModel` that shares the parameters of `model`; neither `model` nor `decoder` is changed.

    `with_streams` makes the program of a name that returns the stream before each layer as well, when hidden states are
    asked for.
    """
    owner = uuid.uuid4().hex
    routed: Any = copy_sharing_weights(model)
    inner = specialize(text_decoder(routed), RoutedDecoder)
    inner.prefill, inner.continuation = prefill, continuation
    inner.routing_config = report.config
    inner.position_rank = position_rank
    inner.layer_features, inner.token_inputs = layer_features, token_inputs
    inner.kinds = _kinds(inner.config, report.reaches)
    inner.stateful = tuple(i for i, reach in enumerate(report.reaches) if reach.state)
    inner.lets_all_see_all = any(getattr(part, "is_causal", True) is False for part in inner.modules())
    inner.owner = owner
    inner.uses_buckets = prefill.cuda_graphs is not None
    specialize(routed, RoutedModel)
    routed.routing_config = report.config
    routed._signature = inspect.signature(type(model).forward)
    routed._reader = PromptReader(
        routed.config,
        report.config,
        visual_ids,
        owner,
        limits=limits,
        has_streams=with_streams is not None,
        position_rank=position_rank,
        asked=asked_inputs(prefill.program),
    )
    routed._report = report
    routed.programs = {"prefill": prefill, "continuation": continuation}
    routed._stream_programs = {}
    if with_streams is not None:
        inner.with_streams = _kept_with(routed._stream_programs, with_streams)
    routed.tower = tower
    if tower is not None and images is not None:
        routed.programs["images"] = images
        routed.base_model.get_image_features = _ImageFeatures(tower, images, routed.config)
    routed._first_call_seconds = {}
    routed._programmed = (Fingerprint(inner, "routed"),)
    reduced = () if tower is None else (Fingerprint(routed, "routed"),)
    routed._fingerprints = Fingerprint(model, "model"), *routed._programmed, *reduced
    done: RoutedModel = routed
    return done


def _kinds(config: Any, reaches: Sequence[Reach]) -> dict[str, list[Reach]]:
    """What tokens see, by the names that a decoder gives its kinds of layers and their masks."""
    names = getattr(config, "layer_types", None) or [UNNAMED] * len(reaches)
    kinds: dict[str, list[Reach]] = {name: [] for name in names}
    for name, reach in zip(names, reaches, strict=True):
        if reach not in kinds[name] and not reach.state:
            kinds[name].append(reach)
    return kinds


def _kept_with(
    programs: dict[str, Executable | TensorRTProgram], make: Callable[[str], Executable | TensorRTProgram]
) -> Callable[[str], Executable | TensorRTProgram]:
    """`make` that is called once for each name, and keeps what it made in `programs`."""

    def program(name: str) -> Executable | TensorRTProgram:
        title = f"{name} with hidden states"
        if title not in programs:
            programs[title] = make(name)
        return programs[title]

    return program


class _ImageFeatures:
    """Stands in for `get_image_features` of a model whose pictures are reduced.

    Features that are gone are rows of -inf, so that there is one for each placeholder still.
    """

    def __init__(self, tower: CapturedTower, program: Executable | TensorRTProgram, config: Any) -> None:
        self.tower, self.program, self.config = tower, program, config

    def __call__(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor | None = None, **given: Any
    ) -> ReducedFeatures:
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            expected = getattr(self.config, name, None)
            if given.get(name) not in (None, expected):
                raise InputError(
                    f"{name} is {given[name]!r}; expected {expected!r}, with which the vision tower was compiled. "
                    f"Leave it out."
                )
        images, grid = self.tower.images, None if image_grid_thw is None else image_grid_thw.cpu()
        images.check(pixel_values, grid)
        features = self.program(**images.inputs(pixel_values.contiguous(), grid))["features"]
        return ReducedFeatures(pooler_output=list(features.split(images.sizes(pixel_values, grid))))  # type: ignore[arg-type]
