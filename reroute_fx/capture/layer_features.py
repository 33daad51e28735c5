"""Visual features that a decoder adds to its stream at some of its layers (DeepStack, arXiv 2406.04334)."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..passes.tensor_names import addend_input


@dataclass(frozen=True)
class LayerFeatures:
    """How a decoder takes them. Its programs take a dense addend for each of the layers, zero for text.

    Attributes:
        layers: ascending.
        before: whether they are added to what goes into a layer; otherwise to what comes out of it.
        mask: the decoder's argument that marks visual tokens, ``[B, S]`` bool, with `before` ``[B, S, 1]``.
        features: its argument that holds a tensor ``[T, d]`` for each layer: a list, with `before` a dictionary.
    """

    layers: tuple[int, ...]
    before: bool
    mask: str
    features: str

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the addends of a program."""
        return tuple(map(addend_input, self.layers))

    def arguments(self, is_visual: torch.Tensor, features: list[torch.Tensor]) -> dict[str, Any]:
        """What the decoder is called with, for features ``[T, d]`` of the tokens that ``[B, S]`` bool marks."""
        if self.before:
            return {
                self.mask: is_visual[..., None],
                self.features: dict(zip(self.layers, features, strict=True)),
            }
        return {self.mask: is_visual, self.features: features}

    def addends(self, given: Mapping[str, Any], embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the programs are called with in its place, ``[B, S, d]`` each, as `embeds`."""
        mask, features = given.get(self.mask), given.get(self.features)
        if mask is None or features is None:
            return self.none(embeds)
        places = mask.view(*embeds.shape[:2], 1).expand_as(embeds)
        return {
            name: torch.zeros_like(embeds).masked_scatter(
                places, features[layer if self.before else place].to(embeds.dtype)
            )
            for place, (layer, name) in enumerate(zip(self.layers, self.inputs, strict=True))
        }

    def none(self, embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        """Addends of tokens without any."""
        return {name: torch.zeros_like(embeds) for name in self.inputs}

    @contextmanager
    def added(self, layers: nn.ModuleList, addends: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """While it lasts, `layers` add `addends`, by their names."""
        hooks = [
            self._hook(layers[i], addends[name]) for i, name in zip(self.layers, self.inputs, strict=True)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, layer: nn.Module, addend: torch.Tensor) -> Any:
        if self.before:
            return layer.register_forward_pre_hook(lambda _, given: (given[0] + addend, *given[1:]))
        return layer.register_forward_hook(lambda _, given, stream: stream + addend)


def find_layer_features(model: PreTrainedModel, decoder: PreTrainedModel) -> LayerFeatures | None:
    """How the decoder of a model takes such features, by its arguments and the config; None if it takes none."""
    arguments = inspect.signature(type(decoder).forward).parameters
    config: Any = model.config
    if {"visual_pos_masks", "deepstack_visual_embeds"} <= arguments.keys():
        found: Iterable[int] = range(len(config.vision_config.deepstack_visual_indexes))
        names, before = ("visual_pos_masks", "deepstack_visual_embeds"), False
    elif {"vision_mask", "deepstack_features"} <= arguments.keys():
        found = sorted(
            {*(layer for _, layer in config.deepstack_layer_map or ()), *config.spatial_target_layers}
        )
        names, before = ("vision_mask", "deepstack_features"), True
    else:
        return None
    layers = tuple(layer for layer in found if layer < decoder.config.num_hidden_layers)
    return LayerFeatures(layers, before, *names) if layers else None


def adding_features(decoder: PreTrainedModel, features: LayerFeatures) -> None:
    """Let a decoder take addends by their names, in place of features that it scatters itself."""
    base: Any = type(decoder)

    def forward(self: Any, **given: Any) -> Any:
        addends = {name: given.pop(name) for name in features.inputs}
        with features.added(self.layers, addends):
            return base.forward(self, **given)

    decoder.__class__ = type(base.__name__, (base,), {"forward": forward})
