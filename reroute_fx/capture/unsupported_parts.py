"""Parts of a decoder that no pass could make up for: refused by name, before anything is traced."""

import torch

from ..errors import UnsupportedModelError

_CROSS_ATTENTION = ("cross_attn", "cross_attention", "encoder_attn")
_CHANGING_ROPE = frozenset({"dynamic", "longrope"})


def refuse_unsupported_parts(decoder: torch.nn.Module) -> None:
    """Raise UnsupportedModelError for cross-attention, for several residual streams (AltUp, arXiv 2301.13310), and for
    rotary positions that change with a call's length.
    """
    for name, module in decoder.named_modules():
        if name.endswith(_CROSS_ATTENTION):
            raise UnsupportedModelError(
                f"{type(decoder).__name__} reads pictures by cross-attention ({name}): they never are tokens among the "
                f"text, so there are none to route; expected a decoder whose layers attend to their own tokens only. "
                f"Use the model as it is."
            )
        if name.endswith("altup"):
            raise UnsupportedModelError(
                f"{type(decoder).__name__} has several residual streams, which each of its layers mixes ({name}); "
                f"expected one, in which a token that waits stays as it is. Use the model as it is."
            )
        kinds = getattr(module, "rope_type", None)
        changing = _CHANGING_ROPE.intersection(kinds.values() if isinstance(kinds, dict) else [kinds])
        if changing:
            raise UnsupportedModelError(
                f"{type(decoder).__name__}.{name} has rotary positions of type {min(changing)!r}, whose frequencies "
                f"change with the length of a call; expected a type that has the same for every length, such as "
                f"'default', 'linear', 'llama3' or 'yarn'. Set rope_parameters of the text config to one, or use the "
                f"model as it is."
            )
