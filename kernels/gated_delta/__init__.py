"""``reroute::gated_delta``: linear attention, whose memory is a matrix for each head."""

import torch

from .chunks import gated_delta_in_chunks
from .reference import gated_delta_reference

__all__ = ["gated_delta", "gated_delta_in_chunks", "gated_delta_reference"]


@torch.library.custom_op("reroute::gated_delta", mutates_args=())
def gated_delta(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gated delta rule (Gated DeltaNet, arXiv 2412.06464, equation 10) on normalized queries and keys.

    ``state = exp(decay) * state``, ``state += beta * key^T (value - key @ state)``, ``result = query @ state /
    sqrt(D)``, token by token; computed at least in float32 and in chunks of tokens.

    Args:
        query: ``[B, S, H, D]``, floating point. Rows start with their first token.
        key: ``[B, S, H, D]``.
        value: ``[B, S, Hv, Dv]``, Hv a multiple of H: neighbouring heads have the same queries and keys.
        decay: logarithm of what is left of the state at each token, ``[B, S, Hv]``, at most 0.
        beta: how much a token writes, ``[B, S, Hv]``.
        state: that of the tokens before, ``[B, Hv, D, Dv]``; None for zeros.
        lengths: tokens of each row, ``[B]`` int64; None for S. What lies behind them is in no state.

    Returns:
        Results ``[B, S, Hv, Dv]``, those behind a row's tokens of no meaning, and the state behind them, ``[B, Hv, D,
        Dv]`` float32, contiguous both.
    """
    return gated_delta_in_chunks(query, key, value, decay, beta, state, lengths)


@gated_delta.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, _, heads, width = value.shape
    final = value.new_empty(batch, heads, key.shape[3], width, dtype=torch.float32)
    return value.new_empty(value.shape), final
