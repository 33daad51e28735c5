"""The latency comparison: a model in eager mode, compiled without routing, and routed, in one run."""

from .comparison import benchmark, check_benchmark
from .measures import MEASURES
from .plot import plot_results
from .result import BenchmarkResult, ContenderResult, Timing

__all__ = [
    "MEASURES",
    "BenchmarkResult",
    "ContenderResult",
    "Timing",
    "benchmark",
    "check_benchmark",
    "plot_results",
]
