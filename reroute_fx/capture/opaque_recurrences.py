"""Scans and causal convolutions of a decoder as one operator each, whatever their code does with the length."""

import inspect
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from .. import kernels  # noqa: F401 - it registers torch.ops.reroute
from ..errors import UnsupportedModelError


def use_operators(decoder: nn.Module) -> None:
    """Let the modules of a decoder, which is a copy, call operators where they would scan or convolve.

    Padding isn't set to zero: in programs it stands behind the tokens of a row, where no earlier token sees it.
    """
    for module in decoder.modules():
        forward: Any = inspect.unwrap(type(module).forward)
        names = getattr(getattr(forward, "__code__", None), "co_names", ())
        called = {name: _OPERATORS[name] for name in names if name in _OPERATORS}
        if called:
            own = FunctionType(
                forward.__code__,
                {**forward.__globals__, **called},
                forward.__name__,
                forward.__defaults__,
                forward.__closure__,
            )
            own.__kwdefaults__ = forward.__kwdefaults__
            module.forward = MethodType(own, module)


def _scan(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    if not use_qk_l2norm_in_kernel:
        raise UnsupportedModelError(
            "A layer scans by the gated delta rule without normalized queries and keys; expected them normalized. Use "
            "the model as it is."
        )
    return torch.ops.reroute.gated_delta(query, key, value, g, beta)[0], None


def _convolve(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> torch.Tensor:
    result: torch.Tensor = torch.ops.reroute.causal_convolution(hidden_states, weight, bias)[0]
    if activation is None:
        return result
    activated: torch.Tensor = ACT2FN[activation](result)
    return activated


_OPERATORS = {
    "torch_chunk_gated_delta_rule": _scan,
    "causal_conv1d_fn": _convolve,
    "apply_mask_to_padding_states": lambda hidden_states, attention_mask: hidden_states,
}
"""By the names of the functions of transformers that they stand for."""
