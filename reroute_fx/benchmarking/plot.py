"""The measured times as bars, with what theory leaves of the compiled model's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..common.plot_files import check_plot
from ..config.routing_config import RoutingConfig
from .measures import MEASURES

_COLOURS = {"eager": "#9aa0a6", "compiled": "#4878a8", "routed": "#e07b39"}
_WIDTH, _HEIGHT = 11.0, 3.4
"""Inches of the figure, and of each batch."""
_BAR = 0.7


class Timed(Protocol):
    """Seconds of one contender in one measure."""

    @property
    def p50(self) -> float: ...
    def percentile(self, percent: float) -> float: ...


class Measured(Protocol):
    """What is drawn of a `BenchmarkResult`, whose attributes it has."""

    @property
    def model(self) -> str: ...
    @property
    def config(self) -> RoutingConfig: ...
    @property
    def backend(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def batch(self) -> int: ...
    @property
    def new_tokens(self) -> int: ...
    @property
    def contenders(self) -> Mapping[str, Any]: ...
    def timing(self, name: str, measure: str) -> Timed: ...
    def speedup(self, measure: str) -> float: ...
    def theoretical_seconds(self, measure: str) -> float: ...


def plot_results(results: Sequence[Measured], path: str | Path) -> None:
    """Draw one row of charts for each result; errors are those of `BenchmarkResult.plot`."""
    target = check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT * len(results) + 0.6), dpi=130, layout="constrained")
    charts = figure.subplots(len(results), len(MEASURES), squeeze=False)
    for row, result in zip(charts, results, strict=True):
        for chart, measure in zip(row, MEASURES, strict=True):
            _draw(chart, result, measure)
        row[0].set_ylabel(f"batch {result.batch}\nmilliseconds, p50")
    first = results[0]
    routing = f"{first.config.method} / {first.config.action}"
    figure.suptitle(f"{first.model}: {routing}, backend {first.backend}, {first.dtype}, {first.device}")
    figure.supxlabel(
        "bars: p50; whiskers: p10 to p90; dashed: what theory leaves of the compiled p50; x: speed-up over compiled",
        fontsize=9,
    )
    figure.savefig(target)


def _draw(chart: Any, result: Measured, measure: str) -> None:
    names = list(result.contenders)
    timings = [result.timing(name, measure) for name in names]
    heights = [1e3 * timing.p50 for timing in timings]
    below = [1e3 * (timing.p50 - timing.percentile(10)) for timing in timings]
    above = [1e3 * (timing.percentile(90) - timing.p50) for timing in timings]
    colours = [_COLOURS[name] for name in names]
    chart.bar(names, heights, _BAR, yerr=[below, above], color=colours, ecolor="#303030", capsize=3)
    labels = [f"{name}\n{_number(height)}" for name, height in zip(names, heights, strict=True)]
    labels[names.index("routed")] += f"\n{result.speedup(measure):.2f}x"
    chart.set_xticks(range(len(names)), labels, fontsize=9)
    place, theory = names.index("routed"), 1e3 * result.theoretical_seconds(measure)
    chart.hlines(
        theory, place - _BAR / 2 - 0.08, place + _BAR / 2 + 0.08, colors="black", linestyles="dashed"
    )
    chart.set_title(_title(result, measure), fontsize=10)
    chart.set_ylim(bottom=0)
    chart.spines[["top", "right"]].set_visible(False)


def _number(milliseconds: float) -> str:
    return f"{milliseconds:.3g}" if milliseconds < 1000 else f"{milliseconds:,.0f}"


def _title(result: Measured, measure: str) -> str:
    title = MEASURES[measure].replace(" without", "\nwithout")
    return f"{title} {result.new_tokens} tokens" if measure == "generate" else title
