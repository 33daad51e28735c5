"""Libraries that come with an extra of the package."""

import importlib
from typing import Any

from ..errors import BackendUnavailableError


def optional_library(name: str, extra: str, needed_for: str) -> Any:
    """Import a library, or a module of one.

    Raises:
        BackendUnavailableError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BackendUnavailableError(
            f"{name} is not installed; expected it {needed_for}. Run pip install 'reroute-fx[{extra}]'."
        ) from error
