"""The demo: the model that ships with the package is asked for a thing in a scene that it has never seen."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..api import compile
from ..errors import BackendUnavailableError, ConfigError
from ..grounding.questions import Question, questions
from ..grounding.scenes import scene
from ..grounding.scoring import overlap, read_box
from ..loading.models_by_name import DEMO, load_model
from ..loading.prompts import render_chat
from ..visualizing import check_visualize, visualize

SHARE = 2 / 9
"""Of the visual tokens that enter a layer on average: 128 of 576."""
_ROUNDS = 15
_TRIED = 8
"""Phrases; for some of them a scene has no thing."""
_NEW_TOKENS = 16


def run(backend: str, console: Console, number: int, folder: Path) -> None:
    """Ask, compare the answers and times of the model unrouted, with deleted and with routed tokens, draw.

    Args:
        backend: of the compiled models, ``"inductor"`` or ``"eager"``.
        console: for what is printed.
        number: of the scene.
        folder: for the pictures, which are left out without matplotlib.

    Raises:
        ConfigError: `number` is below 0.
        InputError: `folder` is a file.
    """
    if number < 0:
        raise ConfigError(f"scene is {number}; expected 0 or more.")
    missing = _missing_for_pictures(folder)
    loaded = load_model(DEMO, "cpu", "float32")
    model, processor = loaded.model, loaded.processor
    here = scene("demo", number)
    question = questions(here, references=_TRIED, checks=0)[0][0]
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}
    inputs = processor(images=here.picture, text=render_chat(processor, [message]), return_tensors="pt")
    deleted, routed, compiled = (
        compile(model, SHARE, method=method, action=action, backend=backend)
        for method, action in (
            ("pdrop", "physical_delete"),
            ("pdrop", "compact_route_stagewise"),
            ("none", "compact_route_stagewise"),
        )
    )
    contenders = {"unrouted, eager": model, "unrouted": compiled, "deleted": deleted, "routed": routed}
    console.rule("A small LLaVA on a scene that it never saw")
    console.print(f"[bold]{question.text}[/bold]  expected: {question.answer}")
    visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
    text = inputs["input_ids"].numel() - visual
    console.print(routed.report.at(visual_tokens=visual, text_tokens=text))
    console.print(_answers(contenders, dict(inputs), processor, question, console))
    if missing:
        console.print(f"Pictures are left out: {missing}", markup=False)
        return
    page = visualize(routed, inputs, folder, processor, max_new_tokens=_NEW_TOKENS)
    console.print(f"Pictures of scene {number}: {page.with_name('prompt-0.png')} and {page}")


def _missing_for_pictures(folder: Path) -> str:
    """What is not installed, and how to get it; empty if pictures can be drawn."""
    try:
        check_visualize(folder)
    except BackendUnavailableError as error:
        return str(error)
    return ""


def _answers(
    contenders: dict[str, Any], inputs: dict[str, Any], processor: Any, question: Question, console: Console
) -> Table:
    answers = {}
    for name, model in track(
        contenders.items(), description="compiling, answering", console=console, transient=True
    ):
        tokens = model.generate(**inputs, max_new_tokens=_NEW_TOKENS, do_sample=False)
        text = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers[name] = text.strip()
    calls = {name: _prefill(model, inputs) for name, model in contenders.items()}
    medians = _medians(calls, console)
    table = Table(title="Same model, same question")
    table.add_column("", no_wrap=True)
    table.add_column("answer", no_wrap=True)
    for heading in ("overlap", "prefill ms", "x eager"):
        table.add_column(heading, justify="right")
    for name, answer in answers.items():
        shared = overlap(read_box(answer), question.box or (0, 0, 0, 0))
        speed = medians["unrouted, eager"] / medians[name]
        table.add_row(name, answer, f"{shared:.2f}", f"{1e3 * medians[name]:.1f}", f"{speed:.2f}")
    return table


def _medians(calls: dict[str, Callable[[], Any]], console: Console) -> dict[str, float]:
    """Median seconds of each call, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in track(range(_ROUNDS), description="measuring", console=console, transient=True):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _prefill(model: Any, inputs: dict[str, torch.Tensor]) -> Callable[[], Any]:
    return torch.no_grad()(lambda: model(**inputs, logits_to_keep=1))
