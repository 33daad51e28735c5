"""Rows that start with their first token, whatever padding they came with."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Places:
    """Where the tokens of padded rows lie.

    Moving them to the front makes plain causal attention right: what follows a row's last token is seen by none.

    Attributes:
        order: column of each token, tokens first, ``[B, S]`` int64.
        source: for each column its place among the tokens; padding has that of the token before it, ``[B, S]``.
    """

    order: torch.Tensor
    source: torch.Tensor

    @classmethod
    def of(cls, is_token: torch.Tensor) -> "Places":
        """For ``[B, S]`` bool."""
        order = (~is_token).to(torch.int8).sort(dim=1, stable=True).indices
        return cls(order, (is_token.cumsum(dim=1) - 1).clamp(min=0))

    def to_front(self, columns: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """`columns` ``[..., B, S, ...]`` with its tokens first; `dim` is that of S."""
        return _take(columns, self.order, dim)

    def to_columns(self, rows: torch.Tensor) -> torch.Tensor:
        """``[B, S, ...]`` back in the columns of the batch.

        Columns of padding repeat the token before them, so that the last column always is a row's last token.
        """
        return _take(rows, self.source, 1)

    def to(self, device: torch.device) -> "Places":
        return Places(*torch.stack([self.order, self.source]).to(device).unbind())


def _take(tensor: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    lead, tail = tensor.shape[: dim - 1], tensor.shape[dim + 1 :]
    index = index.view(*(1 for _ in lead), *index.shape, *(1 for _ in tail))
    return tensor.gather(dim, index.expand(*lead, *index.shape[len(lead) : len(lead) + 2], *tail))
