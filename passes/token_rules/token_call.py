"""A call of an operator as a rule sees it."""

from collections.abc import Callable
from typing import Any

import sympy
from torch import fx

from ..graph_edit import is_tensor, named_arguments, shape
from ..token_rows import Groups, Mixes, Ranks, Rows, Several, agreed


class Call:
    """A call and where the tokens lie in its arguments.

    Attributes:
        node: the call.
        given: its arguments by name.
        places: of all nodes before it.
        batch: rows of the batch, B.
        length: tokens of a row, S.
    """

    def __init__(
        self, node: fx.Node, places: dict[fx.Node, Any], batch: sympy.Expr, length: sympy.Expr
    ) -> None:
        self.node, self.places = node, places
        self.given = named_arguments(node)
        self.batch, self.length = batch, length

    @property
    def tensors(self) -> list[fx.Node]:
        return [n for n in self.node.all_input_nodes if is_tensor(n)]

    def rows(self, tensor: Any) -> Rows | None:
        """Where tokens lie in an argument."""
        place = self.places.get(tensor) if isinstance(tensor, fx.Node) else None
        if isinstance(place, Several):
            raise Mixes(f"%{tensor.name} relates tokens to each other")
        if isinstance(place, (Ranks, Groups)):
            raise Mixes(f"%{tensor.name} depends on how all tokens are sorted")
        return place

    def first(self) -> Rows | None:
        """Where tokens lie in the first argument, the only one that may have any."""
        source, *others = self.tensors
        for other in others:
            self.without_tokens(other)
        return self.rows(source)

    def without_tokens(self, tensor: Any) -> None:
        if self.rows(tensor) is not None:
            raise Mixes(f"%{tensor.name} is no constant but computed from tokens")

    def dim(self, dim: int, rank: int | None = None) -> int:
        """A dimension counted from the first."""
        return dim % max(1, rank if rank is not None else len(shape(self.tensors[0])))

    def refuse(self, dims: set[int], rows: Rows | None) -> None:
        """Refuse to run along dimensions that count tokens or the batch."""
        if rows is not None and dims & rows.dims:
            raise Mixes(
                f"it runs along dimension {min(dims & rows.dims)}, which counts tokens or rows of the batch"
            )

    def aligned(self, tensors: list[fx.Node], rank: int) -> Rows | None:
        """Where tokens lie in tensors that are broadcast to `rank` dimensions."""
        found = None
        for tensor in tensors:
            rows, own = self.rows(tensor), len(shape(tensor))
            if rows is not None and own != rank:
                rows = rows.moved({dim: dim + rank - own for dim in range(own)})
            found = agreed(found, rows)
        return found


Rule = Callable[[Call], Any]
"""Returns where the tokens lie in what a call returns, or raises `Mixes`."""
