"""Sizes of prompts rounded up, so that few CUDA graphs serve all of them.

What is added lies behind every row's last token and holds no token: nothing sees it.
"""

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F

from ..passes.tensor_names import (
    BLOCKS,
    CACHED,
    INPUTS_EMBEDS,
    LENGTHS,
    MIDDLES,
    POOLS,
    TEXT_INDEX,
    VISUAL_INDEX,
    is_addend_input,
    read_output_name,
)
from ..selection.row_plan import RowPlan

BUCKET = 64
"""Places to whose multiples the stream, the visual tokens and the stages are rounded up."""
_BEHIND = 2**62
"""A number behind those of all pools, blocks and places; `F.pad` takes numbers as floats, which have no 2^63 - 1."""


def pad_inputs(
    inputs: Mapping[str, torch.Tensor], token_inputs: Collection[str] = ()
) -> dict[str, torch.Tensor]:
    """Inputs of a routed program with rounded sizes.

    Args:
        inputs: ``inputs_embeds [B, S, d]``, addends of layers like it, ``position_ids [..., B, S]`` and those of
            `RowPlan.inputs`.
        token_inputs: names of others that are ``[B, S, ...]``.
    """
    places = inputs[INPUTS_EMBEDS].shape[1]
    padded = {}
    for name, tensor in inputs.items():
        if name == INPUTS_EMBEDS or is_addend_input(name) or name in token_inputs:
            padded[name] = F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, _missing(places)))
        elif name == LENGTHS:
            padded[name] = tensor
        elif name in (VISUAL_INDEX, TEXT_INDEX):
            padded[name] = F.pad(tensor, (0, _missing(tensor.shape[-1])), value=places)
        elif name in (POOLS, BLOCKS, MIDDLES):
            padded[name] = F.pad(tensor, (0, _missing(tensor.shape[-1])), value=_BEHIND)
        else:
            padded[name] = F.pad(tensor, (0, _missing(tensor.shape[-1])))
    return padded


def cut_outputs(
    values: Mapping[str, torch.Tensor], plan: RowPlan, places: int, stateful: tuple[int, ...] = ()
) -> dict[str, torch.Tensor]:
    """What a program exposes, in the sizes of the prompt that was padded.

    Args:
        values: ``key.<layer>`` and ``value.<layer>`` ``[B, Hkv, S', D]``, ``index.<layer>`` ``[B, S']``,
            ``scores.<layer>`` and ``kept.<layer>`` ``[B, N]``, ``stream.<layer>`` ``[B, S, d]``.
        plan: of the prompt.
        places: S of the prompt.
        stateful: layers whose keys and values are states, which have no places.
    """
    tokens, cut = plan.inputs[VISUAL_INDEX].shape[1], {}
    for name, tensor in values.items():
        kind, layer = read_output_name(name)
        if kind in CACHED and layer in stateful:
            cut[name] = tensor
        elif kind in CACHED:
            cut[name] = tensor[:, :, : plan.slots(layer, places)]
        elif kind == "index":
            cut[name] = tensor[:, : plan.slots(layer, places)]
        elif kind == "stream":
            cut[name] = tensor[:, :places]
        else:
            cut[name] = tensor[:, :tokens]
    return cut


def _missing(size: int) -> int:
    return -size % BUCKET
