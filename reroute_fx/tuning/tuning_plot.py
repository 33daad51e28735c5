"""What tuning found, as a picture."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..common.plot_files import check_plot
from ..config.routing_config import RoutingConfig
from ..config.tuned_config import TuningFacts

_COLOURS = {"chosen": "#e07b39", "tier's exact schedule": "#4878a8"}
_TRIAL = "#9aa0a6"
Compared = Mapping[str, tuple[RoutingConfig, float]]
"""What is compared, by name: a configuration and its divergence."""


def plot_tuned(facts: TuningFacts, history: Sequence[float], compared: Compared, path: str | Path) -> None:
    """Draw the divergence of the trials on the left and the tokens in each layer on the right."""
    target = check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4), dpi=130, layout="constrained")
    search, layers = figure.subplots(1, 2)
    _draw_search(search, history, compared)
    _draw_layers(layers, facts.model.layers, compared)
    for chart in (search, layers):
        chart.set_ylim(bottom=0)
        chart.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{facts.name}: tier {facts.tier:g} on {facts.prompts} prompts")
    figure.savefig(target)


def _draw_search(chart: Any, history: Sequence[float], compared: Compared) -> None:
    numbers = range(1, len(history) + 1)
    chart.scatter(numbers, history, s=8, color=_TRIAL, label="trials, on the prompts that they saw")
    chart.step(numbers, list(accumulate(history, min)), color=_TRIAL, where="post")
    for name, (_, divergence) in compared.items():
        chart.axhline(divergence, color=_COLOURS[name], label=name)
    chart.set_xlabel("trial")
    chart.set_ylabel("divergence, nats for a token")


def _draw_layers(chart: Any, count: int, compared: Compared) -> None:
    edges = [layer - 0.5 for layer in range(count + 1)]
    for name, (config, _) in compared.items():
        chart.stairs(config.tokens_per_layer(count), edges, color=_COLOURS[name], label=name, lw=1.8)
    chart.set_xlabel("decoder layer")
    chart.set_ylabel("visual tokens of 576")
