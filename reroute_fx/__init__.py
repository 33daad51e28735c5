"""Recoverable visual-token routing for Hugging Face vision-language models.

>>> import reroute_fx
>>> routed = reroute_fx.compile(model, tier=128)  # doctest: +SKIP
>>> routed.generate(**inputs, max_new_tokens=64)  # doctest: +SKIP
>>> print(routed.report)  # doctest: +SKIP
"""

from importlib.metadata import version

from . import kernels, passes
from .api import compile, inspect
from .config import RoutingConfig
from .errors import (
    BackendUnavailableError,
    CaptureError,
    ConfigError,
    InputError,
    MatchError,
    RerouteError,
    UnsupportedModelError,
)
from .paper import PaperConfig, paper_configs
from .plan import RowPlan, plan_rows
from .report import RoutingReport
from .routing import route
from .runtime import RoutedCache, RoutedModel, Routing

__version__ = version("reroute-fx")

__all__ = [
    "BackendUnavailableError",
    "CaptureError",
    "ConfigError",
    "InputError",
    "MatchError",
    "PaperConfig",
    "RerouteError",
    "RoutedCache",
    "RoutedModel",
    "Routing",
    "RoutingConfig",
    "RoutingReport",
    "RowPlan",
    "UnsupportedModelError",
    "compile",
    "inspect",
    "kernels",
    "paper_configs",
    "passes",
    "plan_rows",
    "route",
]
