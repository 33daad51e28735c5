"""A page that steps through the stages; one file, nothing to load."""

import base64
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib.figure import Figure

from .drawing import Box, draw_answer, draw_scores, draw_tokens, panel_height, stage_name
from .views import PictureView

_SIDE = 4.2
"""Inches of a picture."""


@dataclass(frozen=True)
class PromptPage:
    """What the page says of one prompt.

    Attributes:
        question, answer: empty if they are not known.
        views: its pictures.
        boxes: of the answer, in pixels of the first picture.
    """

    question: str
    answer: str
    views: list[PictureView]
    boxes: list[Box]


def write_page(prompts: list[PromptPage], heading: str) -> str:
    """The page as HTML."""
    environment = Environment(loader=PackageLoader("reroute_fx.visualizing"), autoescape=select_autoescape())
    shown = [_prompt(prompt) for prompt in prompts]
    return environment.get_template("page.html").render(heading=heading, prompts=shown)


def _prompt(prompt: PromptPage) -> dict[str, Any]:
    steps = [{"name": "the picture and the answer", "counts": "", "pictures": _answers(prompt)}]
    for number, stage in enumerate(prompt.views[0].stages):
        stages = [view.stages[number] for view in prompt.views]
        kept, total = sum(int(s.kept.sum()) for s in stages), sum(s.kept.size for s in stages)
        back = sum(int(s.returned.sum()) for s in stages)
        out = "deleted" if prompt.views[0].deletes else "deferred"
        counts = f"{kept} of {total} kept, {total - kept} {out}, {back} came back"
        pictures = [
            _png(view, partial(draw, picture=view.picture, stage=s))
            for s, view in zip(stages, prompt.views, strict=True)
            for draw in (draw_tokens, draw_scores)
        ]
        steps.append({"name": stage_name(stage), "counts": counts, "pictures": pictures})
    return {"question": prompt.question, "answer": prompt.answer, "steps": steps}


def _answers(prompt: PromptPage) -> list[str]:
    drawings = [
        partial(draw_answer, view=view, boxes=prompt.boxes if number == 0 else [])
        for number, view in enumerate(prompt.views)
    ]
    return [_png(view, draw) for view, draw in zip(prompt.views, drawings, strict=True)]


def _png(view: PictureView, draw: Callable[[Any], None]) -> str:
    """A drawing as a data URL."""
    figure = Figure(figsize=(_SIDE, panel_height(view, _SIDE) + 0.5), dpi=110, layout="constrained")
    draw(figure.subplots())
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
