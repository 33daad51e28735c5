"""The latency comparison: a model in eager mode, compiled without routing, and routed, in one run."""

from .comparison import benchmark, check_benchmark
from .measures import MEASURES
from .plot import check_plot, plot_results
from .result import BenchmarkResult, ContenderResult, Timing

__all__ = [
    "MEASURES",
    "BenchmarkResult",
    "ContenderResult",
    "Timing",
    "benchmark",
    "check_benchmark",
    "check_plot",
    "plot_results",
]
