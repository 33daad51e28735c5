"""A profile as heat: layers by heads, one panel for each array."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..common.plot_files import check_plot

_PANELS = {
    "effect": "what the answer takes from\nthe picture (share of all)",
    "recall": "recall of the answer's tokens,\nby the last token",
    "text_recall": "recall of the answer's tokens,\nby all text",
    "attention": "attention of the last\ntoken on the picture",
    "text_attention": "attention of all text\non the picture",
    "entropy": "entropy of attention\nin the picture",
    "lost": "attention x |value| lost\nat the tier",
}
_SHARE_OF_ALL = "effect"
"""Numbers far below 1; all other panels run from 0 to 1."""
_HEAT = "viridis"

Array = np.ndarray[Any, np.dtype[np.float64]]


class Drawn(Protocol):
    """What is drawn of a `Profile`, whose attributes it has."""

    @property
    def model(self) -> str: ...
    @property
    def share(self) -> float: ...
    @property
    def visual_tokens(self) -> tuple[int, ...]: ...
    @property
    def num_layers(self) -> int: ...


def plot_profile(profile: Drawn, path: str | Path) -> None:
    """Draw; errors are those of `Profile.plot`."""
    target = check_plot(path)
    from matplotlib.figure import Figure

    arrays = {name: array for name in _PANELS if (array := getattr(profile, name)) is not None}
    height = max(3.2, min(10.0, 0.17 * profile.num_layers + 1.6))
    figure = Figure(figsize=(2.3 * len(arrays) + 0.6, height), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(arrays), squeeze=False, sharey=True)[0]
    for panel, (name, array) in zip(panels, arrays.items(), strict=True):
        _draw(panel, name, array, profile.share)
    panels[0].set_ylabel("layer")
    figure.suptitle(
        f"{profile.model} unrouted, {len(profile.visual_tokens)} prompts, {100 * profile.share:.1f} % of tokens kept"
    )
    figure.savefig(target)


def _draw(panel: Any, name: str, array: Array, share: float) -> None:
    top = array.max() if name == _SHARE_OF_ALL else 1.0
    heat = panel.imshow(array, cmap=_HEAT, vmin=0, vmax=top, aspect="auto", interpolation="nearest")
    bar = panel.figure.colorbar(heat, ax=panel, location="bottom", shrink=0.9)
    bar.ax.tick_params(labelsize=7)
    if "recall" in name:
        bar.ax.axvline(share, color="white", linewidth=2)
        bar.set_label(f"chance: {share:.2f}", fontsize=8)
    panel.set_title(_PANELS[name], fontsize=8)
    panel.set_xlabel("head", fontsize=8)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.yaxis.get_major_locator().set_params(integer=True)
    panel.tick_params(labelsize=7)
