"""Errors of reroute_fx. Each message says what was wrong, what was expected and what to do."""

from .passes.base_errors import MatchError, RerouteError

__all__ = [
    "ArtifactError",
    "BackendUnavailableError",
    "CaptureError",
    "ConfigError",
    "InputError",
    "MatchError",
    "ParityError",
    "RerouteError",
    "UnsupportedModelError",
    "first_line",
]


class ConfigError(RerouteError, ValueError):
    """A routing configuration or an argument of `compile` is invalid."""


class UnsupportedModelError(RerouteError):
    """The model is of a kind that can't be routed."""


class CaptureError(RerouteError):
    """The decoder could not be exported."""


class InputError(RerouteError, ValueError):
    """The inputs of a call don't fit the model or its routing."""


class BackendUnavailableError(RerouteError):
    """A backend needs something that is not installed."""


class ParityError(RerouteError):
    """Two models that should compute the same don't."""


class ArtifactError(RerouteError):
    """An artifact can't be written, or is not what it should be."""


def first_line(error: BaseException) -> str:
    """What an error says first; its class if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
