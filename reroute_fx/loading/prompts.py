"""Batches of prompts with pictures, for a model named on the command line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import InputError
from .sample_picture import picture

EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
"""Modes of pictures that have 8 bits a channel, or fewer."""


def read_image(path: Path) -> Image.Image:
    """A picture in RGB, upright as its EXIF orientation says.

    Raises:
        InputError: the file can't be read to its end, or has more than 8 bits a channel.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in EIGHT_BITS:
                raise InputError(
                    f"image is {str(path)!r} of mode {image.mode!r}; expected 8 bits a channel. Convert it to "
                    f"RGB, with the range of its values in mind."
                )
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise InputError(f"image is {str(path)!r}; expected a picture that can be read. {error}") from error


def make_batch(
    processor: Any, model: Any, rows: int, prompt: str, image: Image.Image | None
) -> dict[str, Any]:
    """Inputs of `rows` prompts on the model's device, each with the picture, or with one of its own.

    Raises:
        InputError: the tokenizer has no token for a word, or the processor refuses prompt and pictures.
    """
    pictures = [image or picture(seed) for seed in range(rows)]
    _check_words(processor.tokenizer, prompt)
    return encode(processor, model, pictures, [prompt] * rows)


def encode(
    processor: Any, model: Any, pictures: Sequence[Image.Image], prompts: Sequence[str]
) -> dict[str, Any]:
    """Inputs of prompts with a picture in front of each, on the model's device, padded in front.

    Raises:
        InputError: the processor refuses prompts and pictures.
    """
    texts = [_ask(processor, prompt) for prompt in prompts]
    padding = {"padding": True, "padding_side": "left"} if len(set(texts)) > 1 else {}
    try:
        inputs = processor(images=list(pictures), text=texts, return_tensors="pt", **padding)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{type(processor).__name__} refused {len(texts)} pictures with the prompt {texts[0]!r}; expected one "
            f"picture for each placeholder. {error}"
        ) from error
    return {name: place(value, model) for name, value in inputs.items()}


def _check_words(tokenizer: Any, prompt: str) -> None:
    unknown = tokenizer.unk_token_id
    words = [f" {word}" for word in prompt.split()]
    missing = [w.strip() for w in words if unknown in tokenizer(w, add_special_tokens=False)["input_ids"]]
    if unknown is not None and missing:
        raise InputError(
            f"prompt has {missing}, for which {type(tokenizer).__name__} has no token; expected words that the model "
            f"knows. Use others."
        )


def _ask(processor: Any, prompt: str) -> str:
    """The prompt with an image in front, in the words that the model knows."""
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    return render_chat(processor, [{"role": "user", "content": content}])


def render_chat(processor: Any, messages: list[dict[str, Any]]) -> str:
    """A conversation as text that ends where the model answers; in LLaVA-1.5's words without a chat template."""
    if getattr(processor, "chat_template", None):
        return str(processor.apply_chat_template(messages, add_generation_prompt=True))
    turns = []
    for message in messages:
        words = [
            part["text"] if part["type"] == "text" else getattr(processor, "image_token", "<image>") + "\n"
            for part in message["content"]
        ]
        turns.append(f"{message['role'].upper()}: {''.join(words)}")
    return " ".join([*turns, "ASSISTANT:"])


def place(value: Any, model: Any) -> Any:
    """A tensor on the model's device, numbers with a point in its dtype; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(model.device, model.dtype if value.is_floating_point() else None)
