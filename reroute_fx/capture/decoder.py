"""Export the text decoder of a vision-language model, once."""

import time
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel

from .._compat import dynamo_export
from ..errors import CaptureError, RerouteError, UnsupportedModelError, first_line
from .tracing import as_traced, quiet
from .visual_tokens import find_visual_token_ids

_SAMPLE_BATCH, _SAMPLE_LENGTH = 2, 1024


@dataclass(frozen=True)
class CapturedDecoder:
    """An exported decoder.

    Attributes:
        program: from ``inputs_embeds [B, S, d]``, ``attention_mask [B, S]`` and ``position_ids`` to hidden
            states, B and S symbolic, no cache.
        num_layers: layers that the config promises.
        position_rank: dimensions of ``position_ids``: 2 for ``[B, S]``, 3 for ``[3, B, S]``.
        seconds: wall-clock seconds of the export.
    """

    program: ExportedProgram
    num_layers: int
    position_rank: int
    seconds: float


_captured: "WeakKeyDictionary[torch.nn.Module, tuple[Any, CapturedDecoder]]" = WeakKeyDictionary()


def text_decoder(model: torch.nn.Module) -> PreTrainedModel:
    """The text decoder inside a vision-language model.

    Raises:
        UnsupportedModelError: the model is no Hugging Face vision-language model.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"model is a {type(model).__name__}; expected a Hugging Face vision-language model such as "
            f"LlavaForConditionalGeneration."
        )
    find_visual_token_ids(model.config)
    decoder = model.get_decoder()
    if decoder is None or decoder is model or not hasattr(decoder.config, "num_hidden_layers"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no text decoder under get_decoder(); expected a vision-language model "
            f"with a separate language model."
        )
    return decoder


def capture_decoder(model: torch.nn.Module) -> CapturedDecoder:
    """Export the text decoder of `model`; the same decoder is exported once per dtype and device.

    Works on the meta device, where no memory is needed. The model is not changed.

    Raises:
        UnsupportedModelError: no vision-language model, or one spread over several devices.
        CaptureError: torch.export failed; the cause is chained.
    """
    decoder = text_decoder(model)
    devices = {p.device for p in decoder.parameters()}
    if len(devices) != 1:
        raise UnsupportedModelError(
            f"The decoder lies on {sorted(map(str, devices))}; expected one device. Load it with "
            f"device_map='cuda' or another single device."
        )
    state = (decoder.dtype, *devices)
    if decoder not in _captured or _captured[decoder][0] != state:
        _captured[decoder] = state, _export(decoder)
    return _captured[decoder][1]


def _export(decoder: PreTrainedModel) -> CapturedDecoder:
    start = time.perf_counter()
    inputs, shapes = _sample_inputs(decoder)
    try:
        with as_traced(decoder, "sdpa"), quiet():
            program = dynamo_export(decoder, inputs, shapes)
    except RerouteError:
        raise
    except Exception as error:
        raise CaptureError(
            f"torch.export can't trace {type(decoder).__name__}: {first_line(error)}. Expected a decoder that "
            f"transformers.exporters supports; check that the architecture works with DynamoExporter."
        ) from error
    seconds = time.perf_counter() - start
    return CapturedDecoder(program, decoder.config.num_hidden_layers, inputs["position_ids"].ndim, seconds)


def _sample_inputs(decoder: PreTrainedModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs to trace with and their dynamic dimensions."""
    batch, length = Dim("batch", min=1), Dim("length", min=1)
    size = (_SAMPLE_BATCH, _SAMPLE_LENGTH)
    on = {"device": decoder.device}
    embeds = torch.zeros(*size, decoder.config.hidden_size, dtype=decoder.dtype, **on)
    positions = torch.arange(_SAMPLE_LENGTH, **on).expand(size)
    position_shape: dict[int, Any] = {0: batch, 1: length}
    if _has_multimodal_rope(decoder.config):
        positions = positions.expand(3, *size)
        position_shape = {1: batch, 2: length}
    inputs = {
        "inputs_embeds": embeds,
        "attention_mask": torch.ones(size, dtype=torch.long, **on),
        "position_ids": positions.contiguous(),
        "use_cache": False,
    }
    shapes = {
        "inputs_embeds": {0: batch, 1: length},
        "attention_mask": {0: batch, 1: length},
        "position_ids": position_shape,
    }
    return inputs, shapes


def _has_multimodal_rope(config: Any) -> bool:
    """Whether positions have a temporal, a vertical and a horizontal part."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return "mrope_section" in parameters
