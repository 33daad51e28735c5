"""Recoverable visual-token routing for Hugging Face vision-language models.

>>> import reroute_fx
>>> routed = reroute_fx.compile(model, tier=128)  # doctest: +SKIP
>>> routed.generate(**inputs, max_new_tokens=64)  # doctest: +SKIP
>>> print(routed.report)  # doctest: +SKIP

Names are imported when they are first asked for: torch and transformers take seconds. `torch.ops.reroute` is there once
`reroute_fx.kernels` or anything that uses it is.
"""

from importlib import import_module, util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import kernels, passes
    from .analysis.paper_configs import PaperConfig, paper_configs
    from .analysis.routing_report import RoutingReport
    from .api import compile, inspect
    from .artifact import export, load
    from .benchmarking import BenchmarkResult, benchmark
    from .config.limits import Limits
    from .config.routing_config import RoutingConfig
    from .config.savings import Savings
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
    from .methods import Method, Schedule, register_method
    from .pipeline import route
    from .rules import AttentionRule, ChanceRule, LatticeRule, UnionRule, ValueRule
    from .runtime import LoadedModel, RoutedCache, RoutedModel, Slot, SlotPool
    from .selection.row_plan import RowPlan, plan_rows
    from .selection.selection_result import Routing
    from .tuning.profile import Profile, profile
    from .tuning.proposals import Proposal
    from .tuning.tune import tune
    from .tuning.tuned import Tuned
    from .visualizing.visualize import visualize

    __version__: str

_NAMES = {
    "api": ("compile", "inspect"),
    "artifact": ("export", "load"),
    "benchmarking": ("BenchmarkResult", "benchmark"),
    "config.limits": ("Limits",),
    "config.routing_config": ("RoutingConfig",),
    "config.savings": ("Savings",),
    "errors": (
        "ArtifactError",
        "BackendUnavailableError",
        "CaptureError",
        "ConfigError",
        "InputError",
        "MatchError",
        "ParityError",
        "RerouteError",
        "UnsupportedModelError",
    ),
    "methods": ("Method", "Schedule", "register_method"),
    "analysis.paper_configs": ("PaperConfig", "paper_configs"),
    "selection.row_plan": ("RowPlan", "plan_rows"),
    "analysis.routing_report": ("RoutingReport",),
    "pipeline": ("route",),
    "rules": ("AttentionRule", "ChanceRule", "LatticeRule", "UnionRule", "ValueRule"),
    "runtime": ("LoadedModel", "RoutedCache", "RoutedModel", "Slot", "SlotPool"),
    "selection.selection_result": ("Routing",),
    "tuning.profile": ("Profile", "profile"),
    "tuning.proposals": ("Proposal",),
    "tuning.tune": ("tune",),
    "tuning.tuned": ("Tuned",),
    "visualizing.visualize": ("visualize",),
}
"""What each module gives to the package: the imports above, once more for Python."""
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "ArtifactError",
    "AttentionRule",
    "BackendUnavailableError",
    "BenchmarkResult",
    "CaptureError",
    "ChanceRule",
    "ConfigError",
    "InputError",
    "LatticeRule",
    "Limits",
    "LoadedModel",
    "MatchError",
    "Method",
    "PaperConfig",
    "ParityError",
    "Profile",
    "Proposal",
    "RerouteError",
    "RoutedCache",
    "RoutedModel",
    "Routing",
    "RoutingConfig",
    "RoutingReport",
    "RowPlan",
    "Savings",
    "Schedule",
    "Slot",
    "SlotPool",
    "Tuned",
    "UnionRule",
    "UnsupportedModelError",
    "ValueRule",
    "benchmark",
    "compile",
    "export",
    "inspect",
    "kernels",
    "load",
    "paper_configs",
    "passes",
    "plan_rows",
    "profile",
    "register_method",
    "route",
    "tune",
    "visualize",
]


def __getattr__(name: str) -> Any:
    """A public name, or a module of the package."""
    if name in _HOMES:
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    elif name == "__version__":
        value = import_module("importlib.metadata").version("reroute-fx")
    elif not name.startswith("_") and util.find_spec(f"{__name__}.{name}"):
        return import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
