"""Lowering: an exported program in, something that runs fast out. Knows backends only."""

from .executable import BACKENDS, Executable, check_backend, lower

__all__ = ["BACKENDS", "Executable", "check_backend", "lower"]
