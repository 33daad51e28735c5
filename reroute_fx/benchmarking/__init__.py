"""The latency comparison: a model in eager mode, compiled without routing, and routed, in one run."""

from .comparison import benchmark, check_benchmark
from .plot import check_plot, plot_results
from .result import MEASURES, BenchmarkResult, ContenderResult, Timing, check_file, write_json

__all__ = [
    "MEASURES",
    "BenchmarkResult",
    "ContenderResult",
    "Timing",
    "benchmark",
    "check_benchmark",
    "check_file",
    "check_plot",
    "plot_results",
    "write_json",
]
