"""Checks that rules have in common."""

from collections.abc import Sequence
from typing import Literal

from ..errors import ConfigError
from ..passes import SCORING

Layer = Literal["own", "previous"]
"""Whose attention a rule asks: that of the decision layer on its input, or of the layer before it."""
FORBID: dict[str, str] = {"extra": "forbid"}
"""How pydantic reads rules: a misspelt field must not be read as one that was left out."""


def one_of(field: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ConfigError(f"{field} of a rule is {value!r}; expected one of {list(allowed)}.")


def is_layer(value: object) -> None:
    one_of("layer", value, SCORING)


def whole_numbers(field: str, value: object) -> tuple[int, ...]:
    """`value` as a tuple of ints of 0 or more.

    Raises:
        ConfigError: it is something else.
    """
    is_sequence = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_sequence or not all(type(i) is int and i >= 0 for i in value):  # type: ignore[attr-defined]
        raise ConfigError(f"{field} of a rule is {value!r}; expected Python ints of 0 or more.")
    return tuple(value)  # type: ignore[arg-type]
