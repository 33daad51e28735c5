"""The methods: one file each, and the registry.

A method says how visual tokens are ranked, where decisions are and how much they keep. To add one, write its file and
name it in `_BUILT_IN`; outside the package, call `register_method`.
"""

from ..errors import ConfigError
from .avgpool import AVGPOOL
from .coverage import COVERAGE
from .fastv import FASTV
from .fastv_official import FASTV_OFFICIAL_K2, FASTV_OFFICIAL_K3
from .feather import FEATHER
from .method import REFERENCE_LAYERS, GridReduction, Method, Reduction, Schedule
from .nuwa import NUWA
from .pdrop import PDROP
from .pdrop_official import PDROP_OFFICIAL
from .random import RANDOM
from .two_scale import TWO_SCALE
from .value_similarity import VALUE_SIMILARITY

__all__ = [
    "BY_RULES",
    "REFERENCE_LAYERS",
    "UNROUTED",
    "GridReduction",
    "Method",
    "Reduction",
    "Schedule",
    "all_methods",
    "check_name",
    "default_tier",
    "find_method",
    "method_names",
    "reduces",
    "register_method",
    "remember",
]

UNROUTED = "none"
"""Method that decides nothing: the same compiler without routing, the baseline of every comparison."""
BY_RULES = "rules"
"""What configurations that consist of rules have in the place of a method."""
_RESERVED = (UNROUTED, BY_RULES)
_BUILT_IN = (
    FASTV,
    PDROP,
    FASTV_OFFICIAL_K2,
    FASTV_OFFICIAL_K3,
    PDROP_OFFICIAL,
    NUWA,
    FEATHER,
    COVERAGE,
    VALUE_SIMILARITY,
    TWO_SCALE,
    RANDOM,
    AVGPOOL,
)
_methods = {method.name: method for method in _BUILT_IN}
_remembered: set[str] = set()


def register_method(method: Method) -> Method:
    """Make a method known by its name to `compile`, `inspect` and `RoutingConfig`.

    One whose functions are defined in the same place, as when a cell of a notebook runs again, takes the place of the
    method that had the name. Models that are compiled already, and configurations, keep theirs.

    Returns:
        The method.

    Raises:
        ConfigError: it is no `Method`, or the name is taken by a built-in one or by one from another place.
    """
    if not isinstance(method, Method):
        raise ConfigError(f"method is a {type(method).__name__}; expected a reroute_fx.Method.")
    before = _methods.get(method.name)
    is_built_in = method.name in _RESERVED or before in _BUILT_IN
    if before is not method and (is_built_in or (before and _places(before) != _places(method))):
        raise ConfigError(
            f"name of the method is {method.name!r}, which is taken; expected another than {method_names()}. To "
            f"replace a method of your own, define its functions in the same module under the same names."
        )
    _methods[method.name] = method
    return method


def _places(method: Method) -> list[tuple[str, str]]:
    """Where the functions of a method are defined: module and name."""
    functions = (method.rank, method.deleted.ratios, method.routed.ratios)
    named = [function if hasattr(function, "__qualname__") else type(function) for function in functions]
    return [(function.__module__, function.__qualname__) for function in named]


def method_names() -> list[str]:
    """Names of all methods, in the order in which they were registered."""
    return list(_methods)


def all_methods() -> tuple[Method, ...]:
    return tuple(_methods.values())


def find_method(name: str) -> Method:
    """The method with a name.

    Raises:
        ConfigError: there is none.
    """
    if name == BY_RULES:
        raise ConfigError(
            "method is 'rules', which has no schedule; expected a RoutingConfig that is spelled out, with "
            "decision_layers, keep_ratios and rules, or another method."
        )
    if name not in _methods:
        missing = " It is known from an artifact only: register it here too." if name in _remembered else ""
        raise ConfigError(
            f"method is {name!r}; expected one of {[*_methods, UNROUTED]}, or one that reroute_fx.register_method "
            f"was given.{missing}"
        )
    return _methods[name]


def default_tier(name: str) -> float:
    """Tier of a method for those who name none.

    Raises:
        ConfigError: there is no such method.
    """
    return 128 if name == UNROUTED else find_method(name).default_tier


def remember(name: str) -> None:
    """Let configurations name a method that isn't registered here: that of an artifact, which holds its programs."""
    _remembered.add(name)


def reduces(name: str) -> bool:
    """Whether a method reduces pictures before the decoder; true for one that is known from an artifact only."""
    if name in _methods:
        return _methods[name].reduction is not None
    return name not in _RESERVED and name in _remembered


def check_name(name: str) -> None:
    """Raise `ConfigError` unless a configuration may name the method."""
    if name not in _RESERVED and name not in _remembered:
        find_method(name)
