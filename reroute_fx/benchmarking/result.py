"""What was measured, and how it reads."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..common.json_files import write_json
from ..common.tables import as_text
from ..config.routing_config import RoutingConfig
from .expected import Theory
from .measures import MEASURES
from .parity import Parity

_HEADINGS = ("p50", "p10", "p90", "p99", "x eager", "x compiled", "theory", "efficiency")


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender in one measure.

    Attributes:
        rounds: for each round the samples in their order.
    """

    rounds: tuple[tuple[float, ...], ...]

    @property
    def samples(self) -> tuple[float, ...]:
        return tuple(sample for samples in self.rounds for sample in samples)

    def percentile(self, percent: float) -> float:
        """Seconds, interpolated linearly; with few samples those near 0 and 100 are close to the extremes."""
        return float(np.percentile(self.samples, percent))

    @property
    def p50(self) -> float:
        return self.percentile(50)

    def speedup_over(self, baseline: "Timing") -> float:
        """Median over rounds of the ratio of the medians within a round; above 1 is faster than `baseline`."""
        pairs = zip(baseline.rounds, self.rounds, strict=True)
        return statistics.median(statistics.median(b) / statistics.median(s) for b, s in pairs)

    def to_dict(self) -> dict[str, Any]:
        percentiles = {f"p{percent}": self.percentile(percent) for percent in (10, 50, 90, 99)}
        return {
            **percentiles,
            "count": len(self.samples),
            "rounds": [list(samples) for samples in self.rounds],
        }


@dataclass(frozen=True)
class ContenderResult:
    """What one contender took.

    Attributes:
        timings: for each of `MEASURES`.
        first_call_seconds: of the first prefill and decoding step here, in which the compiler works unless the model
            was called before.
        compilations: regions compiled in these first calls, by program; empty for eager mode.
        kv_bytes: keys and values after the prompts, padding included, without room for more.
        peak_bytes: by which one `generate` raises the memory in use; None where that can't be told.
    """

    timings: Mapping[str, Timing]
    first_call_seconds: Mapping[str, float]
    compilations: Mapping[str, int]
    kv_bytes: int
    peak_bytes: int | None


@dataclass(frozen=True)
class BenchmarkResult:
    """One batch, measured; ``str(result)`` is a table. All times are seconds, all sizes bytes.

    Attributes:
        model: class of the original model.
        config: what was routed.
        backend: of the compiled and the routed model.
        device: of all.
        dtype: of the parameters.
        visual_tokens: of each row.
        text_tokens: of each row.
        new_tokens: that were generated for each row.
        rounds: how often everything was measured.
        warmup: rounds before these, not measured.
        contenders: ``"eager"``, ``"compiled"`` and ``"routed"``.
        theory: costs of the decoder.
        parity: how far the routed model agrees with its graph.
        environment: versions and machine.
    """

    model: str
    config: RoutingConfig
    backend: str
    device: str
    dtype: str
    visual_tokens: tuple[int, ...]
    text_tokens: tuple[int, ...]
    new_tokens: int
    rounds: int
    warmup: int
    contenders: Mapping[str, ContenderResult]
    theory: Theory
    parity: Parity
    environment: Mapping[str, Any]

    @property
    def batch(self) -> int:
        return len(self.visual_tokens)

    def timing(self, contender: str, measure: str) -> Timing:
        return self.contenders[contender].timings[measure]

    def speedup(self, measure: str, contender: str = "routed", over: str = "compiled") -> float:
        """How many times faster `contender` is than `over`: the median over rounds of the ratio within a round."""
        return self.timing(contender, measure).speedup_over(self.timing(over, measure))

    def theoretical_seconds(self, measure: str) -> float:
        """What routing leaves of the compiled model's median if the decoder scales as its costs do.

        A prefill scales with its FLOPs, a decoding step with the bytes that it reads. The vision tower, and what
        `generate` does besides, stay as they were measured.
        """
        prefill = self.timing("compiled", "first_token_without_tower").p50
        step = self.timing("compiled", "decode_step").p50
        prefills = 0 if measure == "decode_step" else 1
        steps = {"decode_step": 1, "generate": self.new_tokens - 1}.get(measure, 0)
        decoder = prefills * prefill + steps * step
        rest = max(0.0, self.timing("compiled", measure).p50 - decoder)
        scaled = prefills * prefill / self.theory.prefill_speedup + steps * step / self.theory.step_speedup
        return rest + scaled

    def theoretical_speedup(self, measure: str) -> float:
        return self.timing("compiled", measure).p50 / self.theoretical_seconds(measure)

    def efficiency(self, measure: str) -> float:
        """Share of the theoretical speed-up over the compiled model that was measured."""
        return self.speedup(measure) / self.theoretical_speedup(measure)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dictionaries."""
        record = {
            "model": self.model,
            "config": self.config.to_dict(),
            "backend": self.backend,
            "device": self.device,
            "dtype": self.dtype,
            "batch": self.batch,
            "visual_tokens": self.visual_tokens,
            "text_tokens": self.text_tokens,
            "new_tokens": self.new_tokens,
            "rounds": self.rounds,
            "warmup": self.warmup,
            "contenders": {name: _contender_dict(result) for name, result in self.contenders.items()},
            "routed_against_theory": {measure: self._comparison(measure) for measure in MEASURES},
            "theory": asdict(self.theory),
            "parity": asdict(self.parity),
            "environment": dict(self.environment),
        }
        plain: dict[str, Any] = json.loads(json.dumps(record))
        return plain

    def _comparison(self, measure: str) -> dict[str, float]:
        return {
            "speedup_over_eager": self.speedup(measure, over="eager"),
            "speedup_over_compiled": self.speedup(measure),
            "theoretical_speedup": self.theoretical_speedup(measure),
            "theoretical_seconds": self.theoretical_seconds(measure),
            "efficiency": self.efficiency(measure),
        }

    def save(self, path: str | Path) -> None:
        """Write `to_dict` as JSON, whole or not at all.

        Raises:
            InputError: the folder doesn't exist, or `path` is one.
        """
        write_json(path, self.to_dict())

    def plot(self, path: str | Path) -> None:
        """Draw the medians of all measures, with what theory leaves of the compiled ones.

        Args:
            path: the suffix says the format: .png, .svg, .pdf.

        Raises:
            BackendUnavailableError: matplotlib is missing.
            InputError: no such folder or format.
        """
        from .plot import plot_results

        plot_results([self], path)

    def __str__(self) -> str:
        return as_text(self)

    def __rich__(self) -> RenderableType:
        times = [self._time_table(measure) for measure in MEASURES]
        return Group(self._title(), *times, self._memory_table(), self._notes())

    def _title(self) -> Text:
        name = self.environment["gpu"] or f"{self.environment['cpu']}, {self.environment['threads']} threads"
        lines = [
            f"{self.model}, {self.config.method} / {self.config.action}",
            f"{name}, {self.dtype}, backend {self.backend}",
            f"batch {self.batch}, {_span(self.visual_tokens)} visual and {_span(self.text_tokens)} text tokens a row, "
            f"{self.new_tokens} new ones",
        ]
        return Text("\n".join(lines), style="bold")

    def _time_table(self, measure: str) -> Table:
        count = len(self.timing("eager", measure).samples)
        table = _table(f"{MEASURES[measure]}: milliseconds, {count} samples", ("", *_HEADINGS))
        for name in self.contenders:
            table.add_row(name, *self._time_cells(name, measure))
        return table

    def _time_cells(self, name: str, measure: str) -> list[str]:
        timing = self.timing(name, measure)
        cells = [_milliseconds(timing.percentile(percent)) for percent in (50, 10, 90, 99)]
        cells += [f"{self.speedup(measure, name, over):.2f}" for over in ("eager", "compiled")]
        if name == "routed":
            cells += [f"{self.theoretical_speedup(measure):.2f}", f"{self.efficiency(measure):.2f}"]
        return cells

    def _memory_table(self) -> Table:
        headings = ("prefill s", "step s", "regions", "KV MiB", "peak MiB")
        table = _table("first calls, regions compiled in them, and memory", ("", *headings))
        for name, result in self.contenders.items():
            first = [f"{seconds:.2f}" for seconds in result.first_call_seconds.values()]
            compiled = str(sum(result.compilations.values())) if result.compilations else ""
            peak = "" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:.1f}"
            table.add_row(name, *first, compiled, f"{result.kv_bytes / 2**20:.2f}", peak)
        return table

    def _notes(self) -> Text:
        parity, fewest = self.parity, min(len(self.timing("eager", measure).samples) for measure in MEASURES)
        lines = [
            f"Parity: logits off by {parity.error:.1e}, allowed {parity.tolerance:.1e}{_ties(parity)}.",
            "Theory is over the compiled model, efficiency the share of it that was measured.",
            "Peak is what one generate adds to the memory in use.",
        ]
        if fewest < 100:
            lines.append(f"With {fewest} samples p99 is close to the largest one.")
        return Text("\n".join(lines))


def _contender_dict(result: ContenderResult) -> dict[str, Any]:
    return {
        "seconds": {measure: timing.to_dict() for measure, timing in result.timings.items()},
        "first_call_seconds": dict(result.first_call_seconds),
        "compilations": dict(result.compilations),
        "kv_bytes": result.kv_bytes,
        "peak_bytes": result.peak_bytes,
    }


def _table(title: str, headings: Sequence[str]) -> Table:
    """Numbers under headings; all tables align."""
    table = Table(title=f"\n{title}", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left", min_width=len("compiled") - 2)
    return table


def _milliseconds(seconds: float) -> str:
    """Three significant digits or more."""
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _ties(parity: Parity) -> str:
    if parity.tie_tolerance is None:
        return ""
    return (
        f", and {parity.tie_tolerance:.1e} in {parity.near_tie_rows} rows with {parity.near_ties} near ties"
    )


def _span(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
