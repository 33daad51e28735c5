"""Draw what a routed model does with prompts."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..common.folders import check_folder
from ..common.optional_libraries import optional_library
from ..errors import ConfigError, InputError
from .views import PictureView, check_views, view_rows

PAGE = "index.html"
_BOX = re.compile(r"[\[(]\s*(-?\d+(?:\.\d+)?(?:\s*,\s*-?\d+(?:\.\d+)?){3})\s*[\])]")


def check_visualize(path: str | Path) -> Path:
    """Raise what `visualize` would about its target, before any model is loaded.

    Raises:
        BackendUnavailableError: matplotlib is not installed.
        InputError: `path` is a file.
    """
    optional_library("matplotlib", "bench", "for pictures")
    return check_folder("path", path)


def visualize(
    model: Any,
    inputs: Mapping[str, Any],
    path: str | Path,
    processor: Any = None,
    *,
    max_new_tokens: int = 64,
) -> Path:
    """Draw which visual tokens of each prompt ran through each stage.

    For each prompt `prompt-<row>.png`: the picture, lit where tokens were kept, with frames around those that came
    back, and the scores as heat. `index.html` holds the same in one page and steps through the stages. Files of
    these names are replaced.

    Args:
        model: a `RoutedModel` or `LoadedModel`.
        inputs: what the model is called with: prompts with pictures, no videos.
        path: the folder; it is made.
        processor: the model's; with it the prompts are answered, and boxes in the answers are drawn. Numbers up to 1
            are shares of the picture's sides, larger ones its pixels as the model sees it.
        max_new_tokens: of an answer.

    Returns:
        The path of the page.

    Raises:
        BackendUnavailableError: matplotlib is not installed.
        ConfigError: the model routes nothing.
        InputError: no pictures, a row without one, or `path` is a file.
        UnsupportedModelError: tokens and patches of a picture don't correspond one to one.
    """
    folder = check_visualize(path)
    check_views(inputs)
    if not model.routing_config.decision_layers:
        raise ConfigError(
            "method is 'none', which routes nothing; expected a routed model. Compile it with a tier."
        )
    if model.routing_config.entry_ratio < 1:
        raise ConfigError(
            f"method is {model.routing_config.method!r}, which drops patches in the vision tower; expected one that "
            f"lets all of them into the decoder. Pictures of such methods can't be drawn yet."
        )
    with torch.no_grad():
        routing = model(**inputs, logits_to_keep=1).routing
    rows = view_rows(model.config, inputs, routing, processor)
    empty = [number for number, views in enumerate(rows) if not views]
    if empty:
        raise InputError(
            f"Rows {empty} have no picture; expected one or more in each row. Leave these rows out."
        )
    answers = _answers(model, inputs, processor, max_new_tokens) or [""] * len(rows)
    questions = _questions(model, inputs, processor) or [""] * len(rows)
    _write(folder, list(zip(rows, questions, answers, strict=True)), _heading(model))
    return folder / PAGE


def _write(folder: Path, prompts: list[tuple[list[PictureView], str, str]], heading: str) -> None:
    from .drawing import draw_prompt
    from .page import PromptPage, write_page

    folder.mkdir(parents=True, exist_ok=True)
    pages = []
    for number, (views, question, answer) in enumerate(prompts):
        height, width = views[0].picture.shape[:2]
        boxes = find_boxes(answer, width, height)
        said = "\n".join(text for text in (question, answer) if text)
        draw_prompt(views, boxes, f"{heading}\n{said}").savefig(folder / f"prompt-{number}.png")
        pages.append(PromptPage(question, answer, views, boxes))
    (folder / PAGE).write_text(write_page(pages, heading), encoding="utf-8")


def find_boxes(answer: str, width: int, height: int) -> list[tuple[float, float, float, float]]:
    """All boxes `[x1, y1, x2, y2]` in an answer, in pixels of a picture of this size."""
    boxes = []
    for found in _BOX.findall(answer):
        x1, y1, x2, y2 = map(float, found.split(","))
        across, down = (width, height) if max(x1, y1, x2, y2) <= 1 else (1, 1)
        boxes.append((x1 * across, y1 * down, x2 * across, y2 * down))
    return boxes


def _answers(model: Any, inputs: Mapping[str, Any], processor: Any, max_new_tokens: int) -> list[str]:
    if processor is None:
        return []
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def _questions(model: Any, inputs: Mapping[str, Any], processor: Any) -> list[str]:
    """The prompts, less special tokens."""
    if processor is None:
        return []
    texts = processor.batch_decode(inputs["input_ids"], skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


def _heading(model: Any) -> str:
    config = model.routing_config
    shares = [f"{100 * ratio:.1f} %" for ratio in config.keep_ratios] or config.kept
    layers = ", ".join(map(str, config.decision_layers))
    return f"{config.method}, {config.action}: {', '.join(shares)} kept before layers {layers}"
