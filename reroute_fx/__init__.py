"""Recoverable visual-token routing for Hugging Face vision-language models.

>>> import reroute_fx
>>> routed = reroute_fx.compile(model, tier=128)  # doctest: +SKIP
>>> routed.generate(**inputs, max_new_tokens=64)  # doctest: +SKIP
>>> print(routed.report)  # doctest: +SKIP
"""

from importlib.metadata import version

from . import kernels, passes
from .api import compile, inspect
from .benchmarking import BenchmarkResult, benchmark
from .config import RoutingConfig
from .errors import (
    BackendUnavailableError,
    CaptureError,
    ConfigError,
    InputError,
    MatchError,
    ParityError,
    RerouteError,
    UnsupportedModelError,
)
from .paper import PaperConfig, paper_configs
from .plan import RowPlan, plan_rows
from .report import RoutingReport
from .routing import Savings, route
from .runtime import RoutedCache, RoutedModel, Routing

__version__ = version("reroute-fx")

__all__ = [
    "BackendUnavailableError",
    "BenchmarkResult",
    "CaptureError",
    "ConfigError",
    "InputError",
    "MatchError",
    "PaperConfig",
    "ParityError",
    "RerouteError",
    "RoutedCache",
    "RoutedModel",
    "Routing",
    "RoutingConfig",
    "RoutingReport",
    "RowPlan",
    "Savings",
    "UnsupportedModelError",
    "benchmark",
    "compile",
    "inspect",
    "kernels",
    "paper_configs",
    "passes",
    "plan_rows",
    "route",
]
