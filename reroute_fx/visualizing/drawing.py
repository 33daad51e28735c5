"""Draw what became of a picture's visual tokens, with matplotlib."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .views import Array, PictureView, StageView, enlarge

_PANEL = 2.9
"""Inches of a panel's side."""
_DIMMED = 0.22
"""Brightness of what doesn't run through a stage."""
_RETURNED, _BOX = "#ff2fd6", "#00c853"
_HEAT = "magma"

Box = tuple[float, float, float, float]


def draw_prompt(views: list[PictureView], boxes: list[Box], title: str) -> Figure:
    """One row of panels for the tokens and one for the scores of each picture.

    Args:
        views: pictures of one prompt.
        boxes: that the model answered, in pixels of the first picture.
        title: stands above.
    """
    columns = 1 + len(views[0].stages)
    rows = 2 * len(views)
    size = (_PANEL * columns, sum(2 * panel_height(view) + 0.9 for view in views) + 0.8)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for number, view in enumerate(views):
        upper, lower = panels[2 * number], panels[2 * number + 1]
        draw_answer(upper[0], view, boxes if number == 0 else [])
        draw_legend(lower[0], view.deletes)
        for stage, tokens, scores in zip(view.stages, upper[1:], lower[1:], strict=True):
            draw_tokens(tokens, view.picture, stage)
            draw_scores(scores, view.picture, stage)
    figure.suptitle(title.replace("$", r"\$"), wrap=True)  # dollars would enclose formulas
    return figure


def panel_height(view: PictureView, width: float = _PANEL) -> float:
    """Inches of a panel so wide that shows a picture and its title."""
    height, across = view.picture.shape[:2]
    return width * int(height) / int(across) + 0.4


def draw_answer(panel: Any, view: PictureView, boxes: list[Box]) -> None:
    _show(panel, view.picture)
    panel.set_title("the picture and the answer" if boxes else "the picture", fontsize=10)
    for x1, y1, x2, y2 in boxes:
        panel.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=_BOX, linewidth=2.5))


def draw_tokens(panel: Any, picture: Array, stage: StageView) -> None:
    """The picture lit where tokens are kept, and a frame around those that came back."""
    size = picture.shape[0], picture.shape[1]
    lit = np.where(enlarge(stage.kept, size) > 0.5, 1.0, _DIMMED)
    _show(panel, (picture * lit[..., None]).astype(np.uint8))
    height, width = size[0] / stage.kept.shape[0], size[1] / stage.kept.shape[1]
    for row, column in np.argwhere(stage.returned):
        corner = (column * width - 0.5, row * height - 0.5)
        panel.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=_RETURNED, linewidth=1.2))
    counts = f"{stage.kept.sum()} of {stage.kept.size} kept"
    came_back = f", {stage.returned.sum()} came back" if stage.returned.any() else ""
    panel.set_title(f"{stage_name(stage)}\n{counts}{came_back}", fontsize=10)


def draw_scores(panel: Any, picture: Array, stage: StageView) -> None:
    """Scores as heat over the grey picture; logarithms, because a few tokens have most of the attention."""
    _show(panel, np.repeat(picture.mean(axis=2, keepdims=True), 3, axis=2).astype(np.uint8))
    heat = np.log10(np.maximum(stage.scores, 1e-8))
    size = picture.shape[0], picture.shape[1]
    drawn = panel.imshow(np.ma.masked_invalid(enlarge(heat, size)), cmap=_HEAT, alpha=0.75)
    panel.set_title(f"scores before layer {stage.first_layer}", fontsize=10)
    panel.figure.colorbar(drawn, ax=panel, location="bottom", shrink=0.9, label="log10 of attention")


def draw_legend(panel: Any, deletes: bool) -> None:
    panel.axis("off")
    others = "deleted for good" if deletes else "deferred: waits in the residual stream"
    lines = [("lit", "kept: runs through the stage", "#444444"), ("dim", others, "#999999")]
    if not deletes:
        lines.append(("framed", "came back: deferred before, kept now", _RETURNED))
    lines.append(("box", "what the model answered", _BOX))
    for place, (name, meaning, colour) in enumerate(lines):
        panel.text(0, 0.85 - 0.2 * place, name, color=colour, fontsize=10, weight="bold")
        panel.text(0, 0.77 - 0.2 * place, meaning, fontsize=8)


def stage_name(stage: StageView) -> str:
    return f"layers {stage.first_layer} to {stage.last_layer}"


def _show(panel: Any, picture: Array) -> None:
    panel.imshow(picture)
    panel.set_xticks([])
    panel.set_yticks([])
