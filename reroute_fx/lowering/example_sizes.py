"""Sizes of the tensors that a program is traced with again."""

from typing import Any

import sympy

_SMALLEST = 5
"""Sizes of 1 and 2 are special."""


class ExampleSizes:
    """Numbers for symbolic sizes, equal where their symbols are.

    They are as large as those that the program was captured with: a compiler decides by them what is worth several
    threads. They are prime, so that none follows from others.
    """

    def __init__(self) -> None:
        self._chosen: dict[sympy.Symbol, int] = {}

    def __call__(self, size: Any) -> int:
        """A number for a size, which is one already, a symbol, or a multiple of one."""
        if isinstance(size, int):
            return size
        factor, symbol = size.node.expr.as_coeff_Mul()
        if symbol not in self._chosen:
            self._chosen[symbol] = self._unused_prime(max(_SMALLEST, size.node.hint // int(factor)))
        return int(factor) * self._chosen[symbol]

    def _unused_prime(self, least: int) -> int:
        prime = sympy.nextprime(least - 1)
        while prime in self._chosen.values():
            prime = sympy.nextprime(prime)
        return int(prime)
