"""Sizes of the tensors that a program is traced with again."""

import math
from typing import Any

import sympy

_SMALLEST = 5
"""Sizes of 1 and 2 are special."""


class ExampleSizes:
    """Numbers for symbolic sizes, equal where their symbols are.

    They are as large as those that the program was captured with: a compiler decides by them what is worth several
    threads. They are prime, so that none follows from others; products of symbols, as patches are of rows and columns,
    are those of their numbers.
    """

    def __init__(self) -> None:
        self._chosen: dict[sympy.Symbol, int] = {}

    def __call__(self, size: Any) -> int:
        """A number for a size, which is one already, a symbol, a product of some, or a multiple of one."""
        if isinstance(size, int):
            return size
        factor, symbol = size.node.expr.as_coeff_Mul()
        least = max(_SMALLEST, size.node.hint // int(factor))
        if symbol.is_Mul:
            for each in sorted(symbol.free_symbols, key=str):
                self._choose(each, math.isqrt(least))
            return int(factor * symbol.subs(self._chosen))
        return int(factor) * self._choose(symbol, least)

    def _choose(self, symbol: sympy.Symbol, least: int) -> int:
        if symbol not in self._chosen:
            self._chosen[symbol] = self._unused_prime(max(_SMALLEST, least))
        return self._chosen[symbol]

    def _unused_prime(self, least: int) -> int:
        prime = sympy.nextprime(least - 1)
        while prime in self._chosen.values():
            prime = sympy.nextprime(prime)
        return int(prime)
