"""Pick the implementation of each `reroute::` operator for a compiler that should see through it.

Before: ``torch.ops.reroute.select_tokens(...)``, opaque to the compiler
After:  ``select_tokens_reference(...)``, a Python function that the compiler traces into ATen
"""

import torch
from torch import fx

from .. import kernels

REFERENCES = {
    torch.ops.reroute.visual_scores.default: kernels.visual_scores_reference,
    torch.ops.reroute.select_tokens.default: kernels.select_tokens_reference,
    torch.ops.reroute.compact_tokens.default: kernels.compact_tokens_reference,
    torch.ops.reroute.restore_tokens.default: kernels.restore_tokens_reference,
}


def use_references(module: fx.GraphModule) -> fx.GraphModule:
    """Replace the operators of `module` in place by the functions that define them."""
    for node in module.graph.nodes:
        node.target = REFERENCES.get(node.target, node.target)
    module.recompile()
    return module
