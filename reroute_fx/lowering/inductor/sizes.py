"""Sizes of a region's inputs as a compiler is given them, and what it took for granted of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP, DimDynamic, ShapeEnv
from torch.utils._sympy.printers import PythonPrinter

_LEAST = 2
"""Compilers take 1 for a size that is never another. Code for symbols runs on it as well."""


@dataclass(frozen=True)
class _Place:
    """Where the number of a symbol is read.

    Attributes:
        input: number of an input.
        dim: its dimension; None if the input is a size itself.
        factor: the size is so many times the symbol.
    """

    input: int
    dim: int | None
    factor: int

    def read(self, inputs: Sequence[Any]) -> int:
        size = inputs[self.input] if self.dim is None else inputs[self.input].shape[self.dim]
        return int(size) // self.factor


class Sizes:
    """Fake tensors for a compiler, of which sizes are symbols or numbers.

    Args:
        values: fake tensors and sizes, as exported.
        inputs: of the call for which the compiler is to choose.
        dynamic: let symbols be symbols; otherwise sizes are those of the call.

    Attributes:
        fake_mode: of `fakes`, in which a compiler notes what it takes for granted.
        symbols: the symbolic sizes; none if not dynamic.
        fakes: stand for the inputs.
    """

    def __init__(self, values: Sequence[Any], inputs: Sequence[Any], dynamic: bool) -> None:
        self._env = ShapeEnv()
        self.fake_mode = FakeTensorMode(shape_env=self._env)
        self._places = _places(values)
        self._first = {symbol: place.read(inputs) for symbol, place in self._places.items()}
        self._hints: dict[sympy.Symbol, int] = {}
        self._new: dict[sympy.Symbol, sympy.Expr] = {
            symbol: self._symbol(number) if dynamic else sympy.Integer(number)
            for symbol, number in self._first.items()
        }
        self.symbols = {str(new): self._size(new) for new in self._new.values()} if dynamic else {}
        self.fakes = [self._fake(value) for value in values]
        self._condition: Any = None

    def _symbol(self, number: int) -> sympy.Symbol:
        hint, source = max(number, _LEAST), ConstantSource(f"size_{len(self._hints)}")
        symbol: sympy.Symbol = self._env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
        self._hints[symbol] = hint
        return symbol

    def _fake(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return self._like(value)
        shape, strides = ([self._like(size) for size in sizes] for sizes in (value.shape, value.stride()))
        with self.fake_mode:
            return torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)

    def _like(self, size: Any) -> Any:
        return size if isinstance(size, int) else self._size(size.node.expr.xreplace(self._new))

    def _size(self, expression: sympy.Expr) -> Any:
        if expression.is_number:
            return int(expression)
        hint = int(expression.xreplace(self._hints))
        return self._env.create_symintnode(expression, hint=hint)

    def numbers(self, inputs: Sequence[Any]) -> list[int]:
        """The numbers of a call that stand for `symbols`; without symbols what tells the sizes apart."""
        return [place.read(inputs) for place in self._places.values()]

    def hold(self, numbers: Sequence[int]) -> bool:
        """Whether what the compiler took for granted holds for `numbers`."""
        if not self.symbols:
            return list(numbers) == list(self._first.values())
        if self._condition is None:
            self._condition = self._written_condition()
        return bool(eval(self._condition, SYMPY_INTERP, dict(zip(self.symbols, numbers, strict=True))))

    def _written_condition(self) -> Any:
        guards = [PythonPrinter().doprint(guard.expr) for guard in self._env.guards]
        return compile(" and ".join(f"({guard})" for guard in guards) or "True", "<sizes>", "eval")


def _places(values: Sequence[Any]) -> dict[sympy.Symbol, _Place]:
    """Where each symbol can be read."""
    places: dict[sympy.Symbol, _Place] = {}
    for number, value in enumerate(values):
        is_tensor = isinstance(value, torch.Tensor)
        for dim, size in enumerate(value.shape if is_tensor else [value]):
            if isinstance(size, torch.SymInt):
                factor, symbol = size.node.expr.as_coeff_Mul()
                if symbol.is_symbol:
                    places.setdefault(symbol, _Place(number, dim if is_tensor else None, int(factor)))
    return places
