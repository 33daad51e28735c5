"""Recoverable visual-token routing for Hugging Face vision-language models.

>>> import reroute_fx
>>> routed = reroute_fx.compile(model, tier=128)  # doctest: +SKIP
>>> routed.generate(**inputs, max_new_tokens=64)  # doctest: +SKIP
>>> print(routed.report)  # doctest: +SKIP
"""

from importlib.metadata import version

from . import kernels, passes
from .api import compile, inspect
from .artifact import export, load
from .benchmarking import BenchmarkResult, benchmark
from .config import RoutingConfig
from .errors import (
    ArtifactError,
    BackendUnavailableError,
    CaptureError,
    ConfigError,
    InputError,
    MatchError,
    ParityError,
    RerouteError,
    UnsupportedModelError,
)
from .limits import Limits
from .methods import Method, Schedule, register_method
from .paper import PaperConfig, paper_configs
from .plan import RowPlan, plan_rows
from .report import RoutingReport
from .routing import Savings, route
from .runtime import LoadedModel, RoutedCache, RoutedModel, Routing
from .visualizing import visualize

__version__ = version("reroute-fx")

__all__ = [
    "ArtifactError",
    "BackendUnavailableError",
    "BenchmarkResult",
    "CaptureError",
    "ConfigError",
    "InputError",
    "Limits",
    "LoadedModel",
    "MatchError",
    "Method",
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
    "Schedule",
    "UnsupportedModelError",
    "benchmark",
    "compile",
    "export",
    "inspect",
    "kernels",
    "load",
    "paper_configs",
    "passes",
    "plan_rows",
    "register_method",
    "route",
    "visualize",
]
