"""Models named on the command line, with their processors."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from ..capture.vision_tower import has_grids
from ..config.routing_config import RoutingConfig
from ..errors import ConfigError, first_line

DEMO = "demo"
CHECKPOINT = Path(__file__).parents[1] / "grounding" / "model"
"""The small LLaVA that ships with the package, trained on generated scenes; its card is in the folder."""
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class NamedModel:
    """A model in eval mode on its device, and its processor."""

    model: Any
    processor: Any


def check_device(device: str, dtype: str) -> None:
    """Raise unless a model of `dtype` can be put on `device`: ``"cpu"``, ``"cuda"``, or ``"cuda:1"`` and the like."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ConfigError(f"device is {device!r}; expected cpu, cuda, or cuda:N with the number of a GPU.")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; expected one of {list(DTYPES)}.")
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device is {device!r}, but torch finds no GPU; expected one and a torch build with CUDA. Use --device cpu."
        )
    if place.index is not None and place.index >= torch.cuda.device_count():
        raise ConfigError(
            f"device is {device!r}, but torch finds {torch.cuda.device_count()} GPUs; expected a number below that."
        )


def read_config(
    name: str, tier: float | None, method: str, action: str, schedule: str = "exact"
) -> RoutingConfig:
    """The routing of a named model, from its config alone.

    Raises:
        ConfigError: no such model, or a routing that it can't have.
    """
    try:
        config = AutoConfig.from_pretrained(_place(name))
    except (OSError, ValueError) as error:
        raise _no_model(name, error) from error
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if layers is None:
        raise ConfigError(f"model is {name!r} and has no decoder layers; expected a vision-language model.")
    return RoutingConfig.from_tier(tier, method, action, schedule, num_layers=layers, grids=has_grids(config))


def load_model(name: str, device: str, dtype: str) -> NamedModel:
    """A model with its weights.

    Args:
        name: model id, folder, or ``"demo"`` for the one that ships with the package.
        device: see `check_device`.
        dtype: one of `DTYPES`; ``"auto"`` is that of the checkpoint.

    Raises:
        ConfigError: it can't be found or has no weights or no processor.
    """
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        processor = AutoProcessor.from_pretrained(_place(name))
        model = AutoModelForImageTextToText.from_pretrained(_place(name), dtype=wanted)
    except (OSError, ValueError) as error:
        raise _no_model(name, error) from error
    return NamedModel(model.eval().to(device), processor)


def _place(name: str) -> str:
    return str(CHECKPOINT) if name == DEMO else name


def _no_model(name: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"model is {name!r}; expected 'demo', a model id, or a folder with config, weights and processor. "
        f"{first_line(error)}"
    )
