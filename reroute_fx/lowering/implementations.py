"""Pick the implementation of each `reroute::` operator for a compiler that should see through it.

Before: ``torch.ops.reroute.select_tokens(...)``, opaque to the compiler
After:  on CPU ``select_tokens_reference(...)``, a Python function that the compiler traces into ATen;
        on CUDA ``torch.ops.reroute.select_tokens_triton(...)``, which it takes apart into kernel launches; what has
        no kernel of its own as on CPU
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .. import kernels

_REFERENCES: dict[Any, Callable[..., Any]] = {
    torch.ops.reroute.attention_with_sinks.default: kernels.attention_with_sinks_reference,
    torch.ops.reroute.attention_with_softcap.default: kernels.attention_with_softcap_reference,
    torch.ops.reroute.causal_convolution.default: kernels.causal_convolution_reference,
    torch.ops.reroute.visual_scores.default: kernels.visual_scores_reference,
    torch.ops.reroute.select_tokens.default: kernels.select_tokens_reference,
    torch.ops.reroute.compact_tokens.default: kernels.compact_tokens_reference,
    torch.ops.reroute.restore_tokens.default: kernels.restore_tokens_reference,
    torch.ops.reroute.restore_tokens_.default: kernels.restore_tokens_reference_,
}
_WITHOUT_KERNEL = {
    torch.ops.reroute.attention_with_sinks.default,
    torch.ops.reroute.attention_with_softcap.default,
    torch.ops.reroute.causal_convolution.default,
}
"""What the reference spells in operators that Inductor or PyTorch fuses."""


def use_implementations(module: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """Replace the operators of `module` in place by their implementations on `device`."""
    for node in module.graph.nodes:
        if node.target in _REFERENCES:
            has_kernel = device.type == "cuda" and node.target not in _WITHOUT_KERNEL
            node.target = _on_cuda(node.target) if has_kernel else _REFERENCES[node.target]
    module.recompile()
    return module


def _on_cuda(operator: Any) -> Any:
    name = operator._schema.name.removeprefix("reroute::")
    # Triton is imported where it is used only: on CPU it need not be installed.
    importlib.import_module(f"{kernels.__name__}.{name.removesuffix('_')}.triton")
    in_place = "_" if name.endswith("_") else ""
    return getattr(torch.ops.reroute, f"{name.removesuffix('_')}_triton{in_place}").default
