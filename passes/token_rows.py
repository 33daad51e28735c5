"""Where the tokens of the stream lie in a tensor, and where they lie after a change of its shape."""

import math
from dataclasses import dataclass
from functools import lru_cache

import sympy
from torch import fx

ONE = sympy.Integer(1)


class Mixes(Exception):
    """Why a call lets tokens see each other, as far as is known."""


@dataclass(frozen=True)
class Axis:
    """One dimension, or a part of it, of size ``outer * n * inner`` over n tokens or rows.

    Attributes:
        dim: the dimension.
        outer: what is counted around: the batch for the tokens in ``[B * S, d]``.
        inner: what is counted inside: two for the tokens in ``[B * S * 2]``, an entry for each of two experts.
    """

    dim: int
    outer: sympy.Expr = ONE
    inner: sympy.Expr = ONE


@dataclass(frozen=True)
class Rows:
    """Each entry belongs to one token.

    Attributes:
        tokens: where the tokens are counted.
        batch: where the rows of the batch are counted; None if the tensor is the same for all.
        order: the sort that the entries of dimension 0 were brought into the order of; None for that of the stream.
    """

    tokens: Axis
    batch: Axis | None = None
    order: fx.Node | None = None

    @property
    def dims(self) -> set[int]:
        """Dimensions in which neighbours are of different tokens."""
        return {self.tokens.dim} | ({self.batch.dim} if self.batch else set())

    def moved(self, places: dict[int, int]) -> "Rows":
        """The same with each dimension at its new place."""
        return Rows(
            _moved(self.tokens, places), _moved(self.batch, places) if self.batch else None, self.order
        )


@dataclass(frozen=True)
class Ranks:
    """Which entry of `rows` comes at each place of a sort, ``[n]``, divided by `divisor`; or the inverse of that."""

    rows: Rows
    order: fx.Node
    divisor: int = 1
    inverse: bool = False


@dataclass(frozen=True)
class Groups:
    """How many entries of a sort have each key, or where each key ends; says nothing about any one token."""

    order: fx.Node
    ends: bool = False


@dataclass(frozen=True)
class Several:
    """Tokens lie in several dimensions, or in a way that no rule follows."""


Place = Rows | Ranks | Groups | Several | None
"""None: the same for all tokens."""


def _moved(axis: Axis, places: dict[int, int]) -> Axis:
    if axis.dim not in places:
        raise Mixes(f"it takes dimension {axis.dim} apart, which runs over tokens or rows of the batch")
    return Axis(places[axis.dim], axis.outer, axis.inner)


def agreed(found: Rows | None, other: Rows | None) -> Rows | None:
    """Where tokens lie in what is computed entry by entry from two tensors of the same rank."""
    if found is None or other is None:
        return found or other
    batches = {rows.batch for rows in (found, other)} - {None}
    if found.tokens != other.tokens or found.order is not other.order or len(batches) > 1:
        raise Mixes("the tokens of its arguments are not the same ones")
    return found if found.batch else other


@lru_cache(maxsize=4096)
def reshaped(
    axis: Axis, span: sympy.Expr, before: tuple[sympy.Expr, ...], after: tuple[sympy.Expr, ...]
) -> Axis | None:
    """The axis over `span` in the same elements under other sizes; None if they tear it."""
    distance = axis.inner * math.prod(before[axis.dim + 1 :])
    behind: sympy.Expr = ONE
    for dim in reversed(range(len(after))):
        inner = distance / behind
        outer = after[dim] / (span * inner)
        if inner.is_integer and outer.is_integer:
            return Axis(dim, outer, inner)
        behind = behind * after[dim]
    return None
