"""Rewrites that save work."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Savings:
    """Rewrites of the routed graph that change nothing about what it computes; each can be switched off.

    Attributes:
        restore_in_place: see `RestoreInPlace`.
    """

    restore_in_place: bool = True
