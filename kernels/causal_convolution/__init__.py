"""``reroute::causal_convolution``: each channel of a token from those of the few tokens up to it."""

import torch

from .reference import causal_convolution_reference

__all__ = ["causal_convolution", "causal_convolution_reference"]


@torch.library.custom_op("reroute::causal_convolution", mutates_args=())
def causal_convolution(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Depthwise convolution over the last K tokens, and what the next tokens need of these.

    Args:
        inputs: ``[B, C, S]``, floating point. Rows start with their first token.
        weight: ``[C, K]``, the factor of the token itself last.
        bias: ``[C]``.
        state: inputs of the K - 1 tokens before, ``[B, C, K - 1]``; None for zeros.
        lengths: tokens of each row, ``[B]`` int64; None for S. What lies behind them is in no state.

    Returns:
        Results ``[B, C, S]``, those behind a row's tokens of no meaning, and the state behind them, contiguous both.
    """
    return causal_convolution_reference(inputs, weight, bias, state, lengths)


@causal_convolution.register_fake
def _(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, channels, _ = inputs.shape
    return inputs.new_empty(inputs.shape), inputs.new_empty(batch, channels, weight.shape[1] - 1)
