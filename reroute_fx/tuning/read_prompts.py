"""The prompts that a model is profiled and tuned on: read and checked before anything runs."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..capture import find_visual_token_ids
from ..config.routing_config import RoutingConfig
from ..errors import ConfigError, InputError
from ..grounding.questions import KINDS, collect
from ..loading.models_by_name import DEMO
from ..loading.prompts import encode, place, read_image
from ..runtime.prompt import Prompt, PromptReader

LEAST = 8
"""Prompts below which nothing can be said about a model."""
_DEMO_SEED = 991

Pair = tuple[Image.Image | str | Path, str]
"""A picture, or the path of one, and the question about it."""
Batch = dict[str, Any]
"""Inputs of one prompt or of several, as a processor returns them, on the model's device."""


def read_prompts(
    model: Any,
    prompts: Sequence[Mapping[str, Any] | Pair],
    processor: Any = None,
    *,
    rows: int = 1,
    least: int = LEAST,
) -> list[Batch]:
    """Prompts as batches that `model` can be called with.

    Args:
        model: a Hugging Face vision-language model.
        prompts: what a processor returned, for one prompt or several each; or (picture, question) pairs.
        processor: the model's; needed for pairs.
        rows: prompts of a batch that is made of pairs. What a processor returned is left as it is.
        least: how many prompts are enough.

    Raises:
        InputError: too few prompts, pairs without a processor, or a prompt that can't be routed or has no picture; the
            message counts from 0.
    """
    if isinstance(prompts, (Mapping, str)) or not isinstance(prompts, Sequence):
        raise InputError(
            f"prompts is a {type(prompts).__name__}; expected a list with an entry for each prompt."
        )
    are_pairs = [isinstance(prompt, tuple) for prompt in prompts]
    if any(are_pairs) and not all(are_pairs):
        raise InputError(
            "prompts holds pairs and processor outputs; expected one kind. Leave the others out."
        )
    if any(are_pairs):
        batches = _encode_pairs(model, prompts, processor, rows)  # type: ignore[arg-type]
    else:
        batches = [_as_batch(model, prompt, number) for number, prompt in enumerate(prompts)]
    reader = PromptReader(
        model.config, RoutingConfig((), method="none"), find_visual_token_ids(model.config), ""
    )
    for number, batch in enumerate(batches):
        _check(reader, batch, model.device, f"prompts[{number * rows if any(are_pairs) else number}]")
    if (found := count_rows(batches)) < least:
        raise InputError(
            f"prompts has {found} prompts; expected at least {least}. Add more of what the model is for."
        )
    return batches


def count_rows(batches: Sequence[Batch]) -> int:
    """Prompts in all batches."""
    return sum(len(batch["input_ids"]) for batch in batches)


def hash_prompts(batches: Sequence[Batch]) -> str:
    """SHA-256 of names, shapes and values of all tensors, in hex: tells whether prompts are the same."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            if isinstance(tensor, torch.Tensor):
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_prompt_file(path: str | Path) -> list[Pair]:
    """(picture, question) pairs from a file with one JSON object a line: ``{"image": "cat.png", "text": "What?"}``.

    Paths of pictures are relative to the file.

    Raises:
        InputError: the file can't be read, or a line is something else; the message counts lines from 1.
    """
    source = Path(path)
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"prompts is {str(path)!r}; expected a file with a JSON object a line. {error}"
        ) from error
    pairs: list[Pair] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
        except json.JSONDecodeError:
            given = None
        if (
            not isinstance(given, dict)
            or set(given) != {"image", "text"}
            or not all(isinstance(part, str) for part in given.values())
        ):
            raise InputError(
                f'{source}, line {number} is {line:.60}; expected {{"image": "path of a picture", "text": "question"}}.'
            )
        pairs.append((source.parent / given["image"], given["text"]))
    return pairs


def demo_prompts(count: int) -> list[Pair]:
    """Questions about generated scenes, for the model that ships: three about places to one with yes or no."""
    checks = count // 4
    asked = collect("train", _DEMO_SEED, count - checks, KINDS[0])
    asked += collect("train", _DEMO_SEED + 1, checks, KINDS[1])
    return [(scene.picture, question.text) for scene, question in asked]


def prompts_of(model: str, path: Path | None, count: int) -> list[Pair]:
    """Prompts for a model that is named on the command line: the first `count` of a file, or the demo's.

    Raises:
        ConfigError: another model than the demo's without a file.
        InputError: see `read_prompt_file`.
    """
    if path is not None:
        return read_prompt_file(path)[:count]
    if model != DEMO:
        raise ConfigError(
            f"prompts are missing for model {model!r}; expected a file with them. Only {DEMO!r} brings its own."
        )
    return demo_prompts(count)


def _encode_pairs(model: Any, pairs: Sequence[Pair], processor: Any, rows: int) -> list[Batch]:
    if processor is None:
        raise InputError(
            "prompts holds pictures and questions but there is no processor; expected the model's."
        )
    read = []
    for number, pair in enumerate(pairs):
        if (
            len(pair) != 2
            or not isinstance(pair[0], (Image.Image, str, Path))
            or not isinstance(pair[1], str)
        ):
            kinds = ", ".join(type(part).__name__ for part in pair)
            raise InputError(f"prompts[{number}] is ({kinds}); expected (picture or path, question).")
        picture, text = pair
        read.append((picture if isinstance(picture, Image.Image) else read_image(Path(picture)), text))
    return [
        encode(processor, model, [picture for picture, _ in part], [text for _, text in part])
        for part in (read[start : start + rows] for start in range(0, len(read), rows))
    ]


def _as_batch(model: Any, given: Any, number: int) -> Batch:
    if not isinstance(given, Mapping) or not isinstance(given.get("input_ids"), torch.Tensor):
        raise InputError(
            f"prompts[{number}] is a {type(given).__name__} without input_ids; expected what the model's processor "
            f"returned, or a (picture, question) pair."
        )
    return {name: place(value, model) for name, value in given.items()}


def _check(reader: PromptReader, batch: Batch, device: torch.device, name: str) -> None:
    try:
        prompt = reader.read(batch, device)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    images = prompt.plan.images if isinstance(prompt, Prompt) else [()] * len(batch["input_ids"])
    without = [row for row, sizes in enumerate(images) if not sum(sizes)]
    if without:
        raise InputError(
            f"{name}: rows {without} have no picture; expected one or more in each. Leave them out."
        )
    mask = batch.get("attention_mask")
    if mask is not None and not mask[:, -1].all():
        raise InputError(
            f"{name}: attention_mask has padding behind the prompt; expected it in front, where answers don't follow "
            f"it. Call the processor with padding_side='left'."
        )
