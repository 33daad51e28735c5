"""Batches of prompts with pictures, for a model named on the command line."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from .errors import InputError
from .pictures import picture


def check_image(path: Path | None) -> None:
    """Raise `InputError` unless the file is a picture."""
    if path is None:
        return
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise InputError(f"image is {str(path)!r}; expected a picture that can be read. {error}") from error


def make_batch(processor: Any, model: Any, rows: int, prompt: str, image: Path | None) -> dict[str, Any]:
    """Inputs of `rows` prompts on the model's device, each with the picture, or with one of its own."""
    pictures = [Image.open(image).convert("RGB") if image else picture(seed) for seed in range(rows)]
    text = _ask(processor, prompt)
    try:
        inputs = processor(images=pictures, text=[text] * rows, return_tensors="pt")
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{type(processor).__name__} refused {rows} pictures with the prompt {text!r}; expected one picture for "
            f"each placeholder. {error}"
        ) from error
    return {name: _placed(value, model) for name, value in inputs.items()}


def _ask(processor: Any, prompt: str) -> str:
    """The prompt with an image in front, in the words that the model knows."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        said = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        return str(said)
    return f"USER: {getattr(processor, 'image_token', '<image>')}\n{prompt} ASSISTANT:"


def _placed(value: Any, model: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(model.device, model.dtype if value.is_floating_point() else None)
