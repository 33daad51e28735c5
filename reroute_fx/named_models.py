"""Models named on the command line, with their processors."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from .config import RoutingConfig
from .demo import Example, llava_example
from .errors import ConfigError, first_line

DEMO = "demo"
DEVICES = ("cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class NamedModel:
    """A model in eval mode on its device, and its processor."""

    model: Any
    processor: Any


def check_device(device: str, dtype: str) -> None:
    if device not in DEVICES:
        raise ConfigError(f"device is {device!r}; expected one of {list(DEVICES)}.")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; expected one of {list(DTYPES)}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device is 'cuda', but torch finds no GPU; expected one and a torch build with CUDA. Use --device cpu."
        )


def read_config(
    name: str, tier: float, method: str, action: str, schedule: str = "exact"
) -> RoutingConfig | None:
    """The routing of a named model, from its config alone; None for the demo's, which is built first.

    Raises:
        ConfigError: no such model, or a routing that it can't have.
    """
    if name == DEMO:
        return None
    try:
        config = AutoConfig.from_pretrained(name).get_text_config(decoder=True)
    except (OSError, ValueError) as error:
        raise _no_model(name, error) from error
    layers = getattr(config, "num_hidden_layers", None)
    if layers is None:
        raise ConfigError(f"model is {name!r} and has no decoder layers; expected a vision-language model.")
    return RoutingConfig.from_tier(tier, method, action, schedule, num_layers=layers)


def load_model(name: str, device: str, dtype: str) -> NamedModel:
    """A model with its weights.

    Args:
        name: model id, folder, or ``"demo"``.
        device: one of `DEVICES`.
        dtype: one of `DTYPES`; ``"auto"`` is that of the checkpoint.

    Raises:
        ConfigError: it can't be found or has no weights or no processor.
    """
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    if name == DEMO:
        example = llava_example()
        model = example.model.to(device, None if dtype == "auto" else wanted)
        return NamedModel(model, _demo_processor(example))
    try:
        processor = AutoProcessor.from_pretrained(name)
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=wanted)
    except (OSError, ValueError) as error:
        raise _no_model(name, error) from error
    return NamedModel(model.eval().to(device), processor)


def _demo_processor(example: Example) -> LlavaProcessor:
    vision, tokenizer = example.model.config.vision_config, example.tokenizer
    size = vision.image_size
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        ),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        image_token=tokenizer.convert_ids_to_tokens(example.model.config.image_token_id),
        num_additional_image_tokens=1,
    )


def _no_model(name: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"model is {name!r}; expected 'demo', a model id, or a folder with config, weights and processor. "
        f"{first_line(error)}"
    )
