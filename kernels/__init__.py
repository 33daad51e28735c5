"""Operators of the routing runtime, one folder each: schema and fake implementation beside the reference.

==========================  ==========================================================================
``attention_with_sinks``    attention with a logit for each head that stands for no token
``attention_with_softcap``  attention whose logits are bounded
``causal_convolution``      each token from the few up to it, and what the next ones need of these
``gated_delta``             linear attention by the gated delta rule, and its state
``visual_scores``           attention of the last prompt row on every visual token, mean over heads
``select_tokens``           positions of the active tokens: all text, and the best visual tokens
``compact_tokens``          rows of sequence tensors at the active positions
``restore_tokens``          rows written back into the residual stream; ``restore_tokens_`` in place
==========================  ==========================================================================

The reference of an operator is plain PyTorch and defines what the operator means; it runs on CPU. On CUDA the
Triton kernels beside it run, ``torch.ops.reroute.<name>_triton``, and Triton is imported then; attention is spelt in
PyTorch's own and has none. Importing this package registers the operators as ``torch.ops.reroute.*``.
"""

from .attention_with_sinks import attention_with_sinks, attention_with_sinks_reference, with_sink_token
from .attention_with_softcap import (
    attention_with_softcap,
    attention_with_softcap_reference,
    soft_cap,
    soft_capped_maps,
)
from .causal_convolution import causal_convolution, causal_convolution_reference
from .compact_tokens import compact_tokens, compact_tokens_reference
from .gated_delta import gated_delta, gated_delta_in_chunks, gated_delta_reference
from .restore_tokens import (
    restore_tokens,
    restore_tokens_,
    restore_tokens_reference,
    restore_tokens_reference_,
)
from .select_tokens import keep_count, select_tokens, select_tokens_reference
from .visual_scores import visual_scores, visual_scores_reference

__all__ = [
    "attention_with_sinks",
    "attention_with_sinks_reference",
    "attention_with_softcap",
    "attention_with_softcap_reference",
    "causal_convolution",
    "causal_convolution_reference",
    "compact_tokens",
    "compact_tokens_reference",
    "gated_delta",
    "gated_delta_in_chunks",
    "gated_delta_reference",
    "keep_count",
    "restore_tokens",
    "restore_tokens_",
    "restore_tokens_reference",
    "restore_tokens_reference_",
    "select_tokens",
    "select_tokens_reference",
    "soft_cap",
    "soft_capped_maps",
    "visual_scores",
    "visual_scores_reference",
    "with_sink_token",
]
