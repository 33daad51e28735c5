"""Sizes of pictures as a model's code computes with them, known from the shapes of what a program is given."""

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch


class KnownSizes:
    """Whole numbers where a model expects an integer tensor such as ``image_grid_thw [1, 3]``.

    They may be symbols of a trace. Rows, products, quotients and lists of them stay such numbers, so that a model may
    split, reshape and count by them; any other function of torch gets a tensor of them.

    Args:
        values: a list of numbers, or a list of such lists.
        device: of the tensor that they stand for.
    """

    dtype = torch.int64

    def __init__(self, values: list[Any], device: torch.device) -> None:
        self._values, self.device = values, device

    @property
    def shape(self) -> torch.Size:
        rows = self._values
        return torch.Size([len(rows), len(rows[0])] if rows and isinstance(rows[0], list) else [len(rows)])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def tolist(self) -> list[Any]:
        return [list(row) for row in self._values] if self.ndim == 2 else list(self._values)

    def tensor(self) -> torch.Tensor:
        """The tensor that they stand for."""
        flat = [number for row in self._values for number in row] if self.ndim == 2 else self._values
        if not flat:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        numbers = [torch.full((1,), number, dtype=self.dtype, device=self.device) for number in flat]
        return torch.cat(numbers).reshape(self.shape)

    def to(self, *_: Any, **__: Any) -> "KnownSizes":
        return self

    long = cpu = clone = flatten = to

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, tuple):
            return self._of(self._values[index])
        rows, columns = index
        if isinstance(rows, slice):
            return self._of([row[columns] for row in self._values[rows]])
        return self._of(self._values[rows][columns])

    def prod(self, dim: int | None = None) -> Any:
        return self._reduced(functools.partial(functools.reduce, operator.mul), dim)

    def sum(self, dim: int | None = None) -> Any:
        return self._reduced(sum, dim)

    def cumsum(self, dim: int, dtype: torch.dtype | None = None) -> Any:
        assert self.ndim == 1
        return self._of([sum(self._values[: i + 1]) for i in range(len(self))])

    def __mul__(self, other: Any) -> Any:
        return self._each(operator.mul, other)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        return self._each(operator.floordiv, other)

    def __pow__(self, other: Any) -> Any:
        return self._each(operator.pow, other)

    def _of(self, values: Any) -> Any:
        return KnownSizes(values, self.device) if isinstance(values, list) else values

    def _reduced(self, reduce: Callable[[list[Any]], Any], dim: int | None) -> Any:
        if self.ndim == 2 and dim in (1, -1):
            return self._of([reduce(row) for row in self._values])
        assert self.ndim == 1
        return reduce(self._values)

    def _each(self, operation: Callable[[Any, Any], Any], other: Any) -> Any:
        others = other.tolist() if isinstance(other, KnownSizes) else [other] * len(self)
        assert self.ndim == 1
        return self._of([operation(*pair) for pair in zip(self._values, others, strict=True)])

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is torch.repeat_interleave:
            return _repeated(*args, **(kwargs or {}))
        plain = torch.utils._pytree.tree_map_only(KnownSizes, KnownSizes.tensor, (args, kwargs or {}))
        return function(*plain[0], **plain[1])


def _repeated(values: Any, repeats: KnownSizes, **_: Any) -> torch.Tensor:
    """Each value as often as `repeats` says, in a size that is known from them."""
    tensor = values.tensor() if isinstance(values, KnownSizes) else values
    return torch.cat([tensor[i : i + 1].expand(times) for i, times in enumerate(repeats.tolist())])
