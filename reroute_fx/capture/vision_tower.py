"""Export what turns pictures into features: vision tower and projector, for any number and size of pictures."""

import copy
import inspect
import itertools
import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import CaptureError, RerouteError, UnsupportedModelError, first_line
from .copies import copy_sharing_weights, without
from .cropped_images import lay_out
from .image_layout import AnyImages, FixedImages, GridImages, SizedImages, TiledImages, encode, encoded
from .patched_tower import PatchedTower, patched_images
from .segments import SEGMENTS
from .tile_packing import find_packing
from .tracing import quiet
from .visual_tokens import has_fixed_size, has_grids


@dataclass(frozen=True)
class CapturedTower:
    """An exported vision tower with its projector.

    Attributes:
        program: from what `images.inputs` returns to ``{"features": [T, d]}``, features of all pictures in order. With
            features that the decoder adds inside it also ``{"layer_features": [layers, T, d]}``. Nodes of the tower's
            layers carry ``meta["region"]``.
        images: how it takes pictures.
    """

    program: ExportedProgram
    images: AnyImages


@dataclass(frozen=True)
class TowerFacts:
    """What is known of a tower from its config.

    Attributes:
        grids: whether pictures have any size, a feature for each cell of patches.
        tokens: features of a picture; None if that depends on its size.
        layers: of the tower.
        has_cls: whether its first token is no patch.
    """

    grids: bool
    tokens: int | None
    layers: int
    has_cls: bool


def tower_facts(config: Any) -> TowerFacts:
    """The tower of a vision-language model, from the model's config."""
    vision = config.vision_config
    layers: int = getattr(vision, "num_hidden_layers", getattr(vision, "depth", 0))
    if not has_fixed_size(config):
        return TowerFacts(has_grids(config), None, layers, False)
    has_cls = config.vision_feature_select_strategy == "default"
    return TowerFacts(False, (vision.image_size // vision.patch_size) ** 2, layers, has_cls)


def capture_vision_tower(model: PreTrainedModel) -> CapturedTower:
    """Export the vision tower and projector of a model; the model is not changed.

    Raises:
        UnsupportedModelError: a tower of a kind that is not known.
        CaptureError: torch.export failed, or the program differs from the model.
    """
    try:
        tower, images = _tower(model)
        sample = _sample(images, model)
        with torch.no_grad():
            expected = tower.expected(model, **sample)
    except RerouteError:
        raise
    except Exception as error:  # Of the model's own code.
        raise CaptureError(
            f"The vision tower of {type(model).__name__} can't encode sample pictures: {first_line(error)}. Use "
            f"reroute_fx.compile without an export."
        ) from error
    inputs = images.inputs(*next(iter(images.apart(**sample))))
    shapes = {name: images.shapes[name] for name in inputs}
    traced = copy_sharing_weights(tower)
    for config in _vision_configs(traced.vision):
        config._attn_implementation = tower.attention
        config.output_attentions = config.output_hidden_states = False
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(traced, (), inputs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise CaptureError(
            f"torch.export can't trace the vision tower of {type(model).__name__}: "
            f"{first_line(error)}. Use reroute_fx.compile without an export."
        ) from error
    _check_sizes(program, shapes)
    _drop_assertions(program)
    _mark_layers(program)
    _drop_unread(program)
    with torch.no_grad():
        _compare(encode(program.module(), images, **sample), expected)
    return CapturedTower(program, images)


def _tower(model: PreTrainedModel) -> tuple[Any, AnyImages]:
    """What is traced, and how it takes pictures."""
    inner = model.base_model
    vision: Any = getattr(model.config, "vision_config", None)
    if hasattr(inner, "visual") and hasattr(inner.visual, "spatial_merge_size"):
        visual = inner.visual
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        window = getattr(visual, "window_size", None)
        grids = GridImages(values, visual.spatial_merge_size, vision.patch_size, window)
        if (sampled := _sampled_table(visual)) is not None:
            edge = math.isqrt(sampled.weight.shape[0])
            return _SampledTower(visual), replace(grids, table=edge, stretch="bicubic")
        return _GridTower(visual), replace(grids, table=getattr(visual, "num_grid_per_side", None))
    if (sized := _sized_tower(model, vision)) is not None:
        return sized, SizedImages(vision.num_channels, sized.unit)
    if (cropped := find_packing(model)) is not None:
        return _CroppedTower(model), cropped
    if (tiled := _tiled_tower(model)) is not None:
        tiles = TiledImages(vision.num_channels, vision.image_size, vision.image_size, tokens=0)
        with torch.no_grad():
            features = tiled.expected(model, **_sample(tiles, model))["features"]
        return tiled, replace(tiles, tokens=len(features) // 3)
    if (fixed := _fixed_images(model, vision)) is not None:
        # LLaVA's own takes its features apart, picture by picture, which fixes the number of pictures.
        tower = _FixedTower if model.config.model_type == "llava" else _AnyFixedTower
        return tower(model), fixed
    if (patched := patched_images(model)) is not None:
        return PatchedTower(model, patched.padded), patched
    raise UnsupportedModelError(
        f"{type(model).__name__} has a vision tower ({type(vision).__name__}) that can't be exported yet; expected one "
        f"that takes pictures of one size and nothing else of them (LLaVA-1.5, InternVL), tiles (SmolVLM, LLaVA-NeXT), "
        f"pictures and their sizes (Mistral 3), or patches and their grids (any Qwen-VL, GLM-4V, PaddleOCR-VL). "
        f"reroute_fx.compile works without an export."
    )


def _fixed_images(model: Any, vision: Any) -> FixedImages | None:
    """The pictures of a model that takes them in one size and nothing else; None if it wants others, or more."""
    encode, size = getattr(model.base_model, "get_image_features", None), getattr(vision, "image_size", None)
    if encode is None or size is None:
        return None
    if "pixel_values" not in inspect.signature(encode).parameters or set(_wanted(encode)) - {"pixel_values"}:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    images = FixedImages(getattr(vision, "num_channels", 3), height, width, tokens=0)
    try:
        with torch.no_grad():
            features = encode(pixel_values=_sample(images, model)["pixel_values"]).pooler_output
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # It takes tiles or patches.
        return None
    counts = {len(each) for each in features}
    return replace(images, tokens=counts.pop()) if len(features) == 2 and len(counts) == 1 else None


def _wanted(encode: Any) -> list[str]:
    """Arguments that have no default."""
    return [
        name
        for name, given in inspect.signature(encode).parameters.items()
        if given.default is given.empty and given.kind is not given.VAR_KEYWORD
    ]


def _sized_tower(model: Any, vision: Any) -> "_SizedTower | None":
    """The tower of a model that takes pictures with their sizes and gives a feature for each cell of patches."""
    inner, merge = model.base_model, getattr(model.config, "spatial_merge_size", None)
    encode = getattr(inner, "get_image_features", None)
    if encode is None or merge is None or _wanted(encode) != ["pixel_values", "image_sizes"]:
        return None
    parts = [child for name, child in inner.named_children() if name.startswith(("vision_", "multi_modal_"))]
    if len(parts) != 2:
        return None
    layer, (tower, projector) = getattr(model.config, "vision_feature_layer", -1), parts
    layers = [layer] if isinstance(layer, int) else list(layer)
    return _SizedTower(tower, projector, layers, merge * vision.patch_size)


def _tiled_tower(model: Any) -> "_TiledTower | None":
    """The tower of a model that takes the tiles of each row apart, with a mask of which pixels are padding."""
    inner = model.base_model
    encode = getattr(inner, "get_image_features", None)
    if encode is None or "pixel_attention_mask" not in inspect.signature(encode).parameters:
        return None
    vision, connector = (getattr(inner, name, None) for name in ("vision_model", "connector"))
    return None if vision is None or connector is None else _TiledTower(vision, connector)


def _sampled_table(visual: nn.Module) -> nn.Embedding | None:
    """The learned table of positions that a tower samples at each patch, bicubically; None if there is none."""
    embeddings = getattr(visual, "embeddings", None)
    if getattr(embeddings, "interpolated_method", None) != "bicubic":
        return None
    table: nn.Embedding | None = getattr(embeddings, "position_embedding", None)
    return table


def _vision_configs(vision: nn.Module) -> list[Any]:
    """Configs of the modules that pictures run through."""
    held = (getattr(part, "config", None) for part in vision.modules())
    return list({id(config): config for config in held if isinstance(config, PreTrainedConfig)}.values())


def _sample(images: AnyImages, model: PreTrainedModel) -> dict[str, Any]:
    pixels, grid = images.sample()
    return {"pixel_values": pixels.to(model.device, model.dtype), "grid": grid}


class _FixedTower(nn.Module):
    """From ``pixel_values`` to features, as `get_image_features` of LLaVA."""

    attention = "sdpa"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.vision = model.base_model.vision_tower
        self.projector = model.base_model.multi_modal_projector
        layer = model.config.vision_feature_layer
        self.layers = [layer] if isinstance(layer, int) else list(layer)
        # The first is the CLS token.
        self.first = 1 if model.config.vision_feature_select_strategy == "default" else 0

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"features": self.of_each(pixel_values).flatten(0, 1)}

    def of_each(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """``[n, tokens, d]``."""
        states = self.vision(pixel_values, output_hidden_states=True).hidden_states
        picked = torch.cat([states[layer][:, self.first :] for layer in self.layers], dim=-1)
        features: torch.Tensor = self.projector(picked)
        return features

    def expected(
        self, model: PreTrainedModel, pixel_values: torch.Tensor, grid: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        return {
            "features": torch.cat(list(model.get_image_features(pixel_values=pixel_values).pooler_output))
        }


class _CroppedTower(_FixedTower):
    """From what `CroppedImages.inputs` returns to features, as `get_image_features` of LLaVA-NeXT."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.newline = model.base_model.image_newline

    def forward(  # type: ignore[override]
        self, pixel_values: torch.Tensor, places: torch.Tensor, weights: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        return {"features": lay_out(self.of_each(pixel_values), self.newline, places, weights)}

    def expected(
        self, model: Any, pixel_values: torch.Tensor, grid: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        return encoded(model.get_image_features(pixel_values=pixel_values, image_sizes=grid))


class _AnyFixedTower(nn.Module):
    """From ``pixel_values [n, C, H, W]`` to features, by the model's own `get_image_features`."""

    attention = "sdpa"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.vision: Any = without(model.base_model, model.get_decoder())

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        return encoded(self.vision.get_image_features(pixel_values=pixel_values))

    def expected(
        self, model: Any, pixel_values: torch.Tensor, grid: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        return encoded(model.base_model.get_image_features(pixel_values=pixel_values))


class _TiledTower(nn.Module):
    """From tiles ``pixel_values [n, C, H, W]`` to features, those of all tiles in order."""

    attention = "sdpa"

    def __init__(self, vision: nn.Module, connector: nn.Module) -> None:
        super().__init__()
        self.vision, self.connector = vision, connector

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        states = self.vision(pixel_values=pixel_values).last_hidden_state
        return {"features": self.connector(states).flatten(0, 1)}

    def expected(
        self, model: Any, pixel_values: torch.Tensor, grid: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        return encoded(model.get_image_features(pixel_values=pixel_values))


class _SizedTower(nn.Module):
    """From one picture ``pixel_values [1, C, H, W]`` to features, by a vision tower and a projector that get its size.

    Attributes:
        unit: pixels along the edge of what becomes one feature.
    """

    attention = "sdpa"

    def __init__(self, vision: nn.Module, projector: nn.Module, layers: list[int], unit: int) -> None:
        super().__init__()
        self.vision, self.projector = vision, projector
        self.layers, self.unit = layers, unit

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        size = [tuple(pixel_values.shape[2:])]
        states = self.vision(pixel_values, image_sizes=size, output_hidden_states=True).hidden_states
        picked = torch.cat([states[layer][0] for layer in self.layers], dim=-1)
        return {"features": self.projector(picked, size)}

    def expected(
        self, model: Any, pixel_values: torch.Tensor, grid: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        return encoded(model.get_image_features(pixel_values=pixel_values, image_sizes=grid))


class _GridTower(nn.Module):
    """From patches and what `GridImages.inputs` knows of their grids to features."""

    attention = SEGMENTS

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.vision = visual

    def forward(
        self,
        pixel_values: torch.Tensor,
        position_ids: torch.Tensor,
        frames: torch.Tensor,
        window_order: torch.Tensor | None = None,
        windows: torch.Tensor | None = None,
        table_places: torch.Tensor | None = None,
        table_weights: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        # The longest segment is known from the shape of `frames`; any number will do.
        given = {"position_ids": position_ids, "cu_seqlens": frames, "max_seqlen": 1}
        if windows is not None:
            given |= {"window_index": window_order, "cu_window_seqlens": windows, "max_window_seqlen": 1}
        grid = None
        if table_places is not None:
            grid = self.stretched(given, table_places, table_weights)
        return _features(self.vision(pixel_values, grid_thw=grid, **given))

    def stretched(self, given: dict[str, Any], places: torch.Tensor, weights: torch.Tensor | None) -> Any:
        """Tell the tower where to look up its table; what is returned is given in place of grids."""
        given |= {"interp_indices": places, "interp_weights": weights}

    def expected(
        self, model: PreTrainedModel, pixel_values: torch.Tensor, grid: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        return _features(model.base_model.visual(pixel_values, grid_thw=grid.to(pixel_values.device)))


class _SampledTower(_GridTower):
    """A tower whose embeddings sample a table of positions, by the sizes of the pictures."""

    def __init__(self, visual: Any) -> None:
        super().__init__(visual)
        self.vision = copy.copy(visual)
        self.vision._modules = {**visual._modules, "embeddings": _LookedUp(visual.embeddings)}

    def stretched(self, given: dict[str, Any], places: torch.Tensor, weights: torch.Tensor | None) -> Any:
        return places, weights

    def expected(
        self, model: PreTrainedModel, pixel_values: torch.Tensor, grid: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        # The model itself takes each frame as a picture.
        frames = grid.repeat_interleave(grid[:, 0], dim=0)
        frames[:, 0] = 1
        return super().expected(model, pixel_values, frames)


class _LookedUp(nn.Module):
    """Embeddings with positions from places in a table, in place of grids."""

    def __init__(self, embeddings: Any) -> None:
        super().__init__()
        self.position_embedding = embeddings.position_embedding

    def forward(self, embeddings: torch.Tensor, _: Any, table: Any, *places: Any) -> torch.Tensor:
        indices, weights = table  # [P, 16] both
        sampled: torch.Tensor = (self.position_embedding(indices).float() * weights[..., None]).sum(dim=1)
        return embeddings + sampled.to(embeddings.dtype)


def _features(output: Any) -> dict[str, torch.Tensor]:
    """What a tower returns, ``[T, d]``, and for each layer of the decoder that adds features of its own."""
    inner = getattr(output, "deepstack_features", None)
    return {"features": output.pooler_output} | ({"layer_features": torch.stack(inner)} if inner else {})


def _check_sizes(program: ExportedProgram, shapes: dict[str, dict[int, Any]]) -> None:
    for node in program.graph.find_nodes(op="placeholder"):
        for dim in shapes.get(node.name, {}):
            if not isinstance(node.meta["val"].shape[dim], torch.SymInt):
                raise CaptureError(
                    f"The vision tower was fixed to size {node.meta['val'].shape[dim]} in dimension {dim} of "
                    f"{node.name}; expected any. It can't be exported; use reroute_fx.compile."
                )


def _drop_assertions(program: ExportedProgram) -> None:
    """What was asserted of dtypes while it was traced holds for all sizes."""
    assertion = torch.ops.aten._assert_tensor_metadata.default
    for node in program.graph.find_nodes(op="call_function", target=assertion):
        program.graph.erase_node(node)
    program.graph_module.recompile()


def _mark_layers(program: ExportedProgram) -> None:
    """Name the layer of each node in ``meta["region"]``, so that equal layers share one region."""
    layers: dict[Any, tuple[str, str]] = {}
    for node in program.graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        found = re.match(r"(.*?)\.(\d+)(\.|$)", stack[-1][0]) if stack else None
        if found:
            layers[node] = found[1], found[2]
    longest = Counter(name for name, _ in layers.values()).most_common(1)
    for node, (name, number) in layers.items():
        if name == longest[0][0]:
            node.meta["region"] = f"layer.{number}"


def _drop_unread(program: ExportedProgram) -> None:
    """What nobody reads in front of the layers may bind sizes. Behind them it keeps the last layer as it is."""
    in_front = list(itertools.takewhile(lambda node: "region" not in node.meta, program.graph.nodes))
    for node in reversed(in_front):
        if node.op == "call_function" and not node.users and not node.is_impure():
            program.graph.erase_node(node)
    program.graph_module.recompile()


def _compare(computed: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Raise unless the program computed what the model does, up to rounding in another order."""
    for found, wanted in zip(computed.values(), expected.values(), strict=True):
        # A hundred roundings of the largest value.
        noise = 100 * torch.finfo(wanted.dtype).eps * wanted.abs().max()
        if found.shape != wanted.shape or (found - wanted).abs().max() > noise:
            raise CaptureError(
                "The exported vision tower computes something else than the model's get_image_features. It can't be "
                "exported; use reroute_fx.compile."
            )
