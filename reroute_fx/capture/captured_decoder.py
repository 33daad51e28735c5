"""Export the text decoder of a vision-language model, once."""

import time
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel

from .._compat import dynamo_export
from ..common.collecting import without_collecting
from ..common.turns import one_at_a_time
from ..errors import CaptureError, RerouteError, UnsupportedModelError, first_line
from .attention_forms import implementation_for
from .copies import copy_sharing_weights
from .fingerprint import Fingerprint
from .layer_features import LayerFeatures, adding_features, find_layer_features
from .modal_experts import run_all_experts
from .opaque_recurrences import use_operators
from .packed_weights import with_plain_weights
from .prompt_groups import grouped_layers
from .structure import structure_of, with_weights, without_weights
from .token_inputs import TokenInput, find_token_inputs
from .tracing import keeping_grad_mode, outputs, quiet, without_writes
from .unsupported_parts import refuse_unsupported_parts
from .visual_tokens import find_visual_token_ids

_SAMPLE_BATCH, _SAMPLE_LENGTH = 2, 1024
_KINDS = 8
"""Kinds of decoders whose traces are kept for others that are alike."""
_COMPARED_TOKENS = 9


@dataclass(frozen=True, eq=False)
class CapturedDecoder:
    """An exported decoder.

    Attributes:
        program: from ``inputs_embeds [B, S, d]``, ``attention_mask [B, S]``, ``position_ids``, the addends of
            `layer_features` and `token_inputs` to hidden states, B and S symbolic, no cache.
        num_layers: layers that the config promises.
        position_rank: dimensions of ``position_ids``: 2 for ``[B, S]``, 3 for ``[3, B, S]``.
        layer_features: visual features that are added inside the decoder; None if there are none.
        token_inputs: what the decoder takes for each token besides.
        makes_masks: whether the model makes masks for its decoder.
        grouped_layers: layers for which it makes masks in which tokens see later ones.
        seconds: wall-clock seconds of the export, or of taking that of a decoder that is alike.
        trace: the same program without weights, one for all decoders that are alike.
    """

    program: ExportedProgram
    num_layers: int
    position_rank: int
    layer_features: LayerFeatures | None
    token_inputs: tuple[TokenInput, ...]
    makes_masks: bool
    grouped_layers: tuple[int, ...]
    seconds: float
    trace: ExportedProgram


@dataclass(frozen=True)
class _Capture:
    """A captured decoder and what it was made from."""

    parts: Fingerprint
    config: str
    structure: Hashable | None
    decoder: CapturedDecoder

    def is_of(self, config: str, structure: Hashable | None) -> bool:
        return self.config == config and self.structure == structure and self.parts.changed() is None


_captured: "WeakKeyDictionary[torch.nn.Module, _Capture]" = WeakKeyDictionary()
_alike: "OrderedDict[Hashable, CapturedDecoder]" = OrderedDict()
"""The latest capture of each kind of decoder, on no weights, by `structure_of`."""


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
    _refuse_replaced_forwards(model, decoder)
    if decoder.get_output_embeddings() is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has a text decoder ({type(decoder).__name__}) with a head of its own, which "
            f"returns logits; expected one that returns hidden states, with the head beside it. Use the model as it is."
        )
    refuse_unsupported_parts(decoder)
    return decoder


def _refuse_replaced_forwards(model: PreTrainedModel, decoder: torch.nn.Module) -> None:
    """What runs the decoder, and the decoder, run their class's forward: another one would run past the routing."""
    if not isinstance(decoder, PreTrainedModel):
        raise UnsupportedModelError(
            f"The text decoder is a {type(decoder).__name__}; expected the Hugging Face module itself, which "
            f"reroute_fx compiles. Put back what torch.compile or another wrapper was given."
        )
    path = next(path for path, module in model.named_modules() if module is decoder)
    names = path.split(".")
    for end in range(len(names) + 1):
        name = ".".join(["model", *names[:end]])
        module = model.get_submodule(".".join(names[:end]))
        if not _runs_its_class(module):
            raise UnsupportedModelError(
                f"{name}.forward was replaced on the instance, by torch.compile or by a hook of accelerate, say; "
                f"expected the forward of {type(module).__name__}, through which routing runs. Take it off "
                f"(`del {name}.forward`, accelerate.hooks.remove_hook_from_module({name}, recurse=True)) and compile "
                f"again: reroute_fx compiles the model itself."
            )


def _runs_its_class(module: torch.nn.Module) -> bool:
    """Whether `module` runs its class's forward, which hooks of accelerate leave on it when they are removed."""
    own = module.__dict__.get("forward")
    return own is None or (getattr(own, "__self__", None) is module and own.__func__ is type(module).forward)


@one_at_a_time
@without_collecting()
def capture_decoder(model: torch.nn.Module) -> CapturedDecoder:
    """Export the text decoder of `model`; once, as long as its parts and its config stay what they are.

    Works on the meta device, where no memory is needed. The model is not changed.

    Raises:
        UnsupportedModelError: no vision-language model, or one spread over several devices, or a decoder that attends
            in another way than the program.
        CaptureError: torch.export failed; the cause is chained.
    """
    decoder = text_decoder(model)
    devices = {p.device for p in decoder.parameters()}
    if len(devices) != 1:
        raise UnsupportedModelError(
            f"The decoder lies on {sorted(map(str, devices))}; expected one device. Load it with "
            f"device_map='cuda' or another single device."
        )
    parts, config = Fingerprint(decoder, "decoder"), decoder.config.to_json_string(use_diff=False)
    if hooked := parts.hooked():
        raise UnsupportedModelError(
            f"{hooked} has a forward hook, which would not run: the decoder's parts are compiled into programs. Remove "
            f"it, or put it on the decoder itself."
        )
    features = find_layer_features(model, decoder)  # type: ignore[arg-type]
    structure: Hashable | None = structure_of(decoder)
    if structure is not None:
        structure = structure, features, makes_masks(model), _grouped(model, decoder)
    if decoder not in _captured or not _captured[decoder].is_of(config, structure):
        _captured[decoder] = _Capture(parts, config, structure, _capture(model, decoder, features, structure))
    return _captured[decoder].decoder


def _capture(
    model: Any, decoder: PreTrainedModel, features: LayerFeatures | None, structure: Hashable | None
) -> CapturedDecoder:
    """Take the trace of a decoder that is alike, or trace it."""
    if decoder.device.type == "meta":
        return _export(decoder, features, model)
    if structure in _alike:
        start, alike = time.perf_counter(), _alike[structure]
        _alike.move_to_end(structure)
        captured = replace(
            alike, program=with_weights(alike.trace, decoder), seconds=time.perf_counter() - start
        )
        try:
            _compare_attention(decoder, captured, model)
        except UnsupportedModelError:
            # A function that it runs was replaced since.
            del _alike[structure]
        else:
            return captured
    captured = _export(decoder, features, model)
    _compare_attention(decoder, captured, model)
    if structure is not None and captured.trace is not captured.program:
        _alike[structure] = replace(captured, program=captured.trace)
        if len(_alike) > _KINDS:
            _alike.popitem(last=False)
    return captured


def makes_masks(model: torch.nn.Module) -> bool:
    """Whether a model makes masks for its decoder, by the function that `generate` looks for."""
    return hasattr(model, "create_masks_for_generate")


def _grouped(model: Any, decoder: PreTrainedModel) -> tuple[int, ...]:
    return grouped_layers(
        model, getattr(decoder.config, "layer_types", None) or [""] * decoder.config.num_hidden_layers
    )


def _export(decoder: PreTrainedModel, features: LayerFeatures | None, model: Any) -> CapturedDecoder:
    start = time.perf_counter()
    more = find_token_inputs(decoder)
    inputs, shapes = _sample_inputs(decoder, features, more)
    traced = copy_sharing_weights(decoder)
    if features is not None:
        adding_features(traced, features)
    keeping_grad_mode(traced)
    use_operators(traced)
    run_all_experts(traced)
    traced.config._attn_implementation = implementation_for(traced)
    # What is asked for besides comes from programs of its own.
    traced.config.output_attentions = traced.config.output_hidden_states = False
    try:
        with quiet():
            program = with_plain_weights(without_writes(dynamo_export(traced, inputs, shapes)))
    except RerouteError:
        raise
    except Exception as error:
        raise CaptureError(
            f"torch.export can't trace {type(decoder).__name__}: {first_line(error)}. Expected a decoder that "
            f"transformers.exporters supports; check that the architecture works with DynamoExporter."
        ) from error
    seconds = time.perf_counter() - start
    trace = without_weights(program, decoder) or program
    return CapturedDecoder(
        program,
        decoder.config.num_hidden_layers,
        inputs["position_ids"].ndim,
        features,
        more,
        makes_masks(model),
        _grouped(model, decoder),
        seconds,
        trace,
    )


@torch.no_grad()
def _compare_attention(decoder: PreTrainedModel, captured: CapturedDecoder, model: Any) -> None:
    """Raise unless the program computes what the decoder does with the attention that the model uses.

    Capturing forces one implementation of attention. What that one doesn't know of (tokens that see what comes after
    them, say) is not in the program.
    """
    ids = torch.arange(_COMPARED_TOKENS, device=decoder.device) * 7 % decoder.config.vocab_size
    positions = torch.arange(_COMPARED_TOKENS, device=decoder.device)[None]
    if captured.position_rank == 3:
        positions = positions.expand(3, 1, -1).contiguous()
    embeds = model.get_input_embeddings()(ids[None])
    inputs = {"inputs_embeds": embeds, "position_ids": positions}
    given, added = _visual_features(captured.layer_features, embeds)
    more = {each.name: _sample(each, embeds) for each in captured.token_inputs}
    given |= more
    if captured.makes_masks:
        # Of text alone. Without them the decoder may let its tokens see later ones.
        ones = torch.ones(1, _COMPARED_TOKENS, dtype=torch.long, device=decoder.device)
        given["attention_mask"] = model.create_masks_for_generate(
            config=model.config, **inputs, attention_mask=ones, past_key_values=None
        )
    expected = decoder(**inputs, **given, use_cache=False).last_hidden_state[0].double()
    mask = torch.ones(1, _COMPARED_TOKENS, dtype=torch.long, device=decoder.device)
    found = outputs(captured.program, inputs | added | more | {"attention_mask": mask})[0][0].double()
    # Half of the digits, of most tokens: now and then rounding sends one to another expert. Attention that is spelt out
    # computes its softmax in float32.
    noise = max(torch.finfo(dtype).eps for dtype in (decoder.dtype, torch.float32)) ** 0.5
    # Of a token without a state of its own, as padding has, the size is 0.
    error = ((found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=noise)).median()
    if not error <= noise:
        raise UnsupportedModelError(
            f"{type(decoder).__name__} attends in another way (implementation "
            f"{decoder.config._attn_implementation!r}) than plain causal scaled-dot-product attention: on "
            f"{_COMPARED_TOKENS} tokens its states differ by {float(error):.2g} of their size, expected at most "
            f"{noise:.1g}. Decoders whose tokens see later ones, or with a logit of their own kind, can't be routed."
        )


def _visual_features(
    features: LayerFeatures | None, embeds: torch.Tensor
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Features of a third of the tokens, as the decoder takes them and as the program does."""
    if features is None:
        return {}, {}
    is_visual = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    is_visual[:, 2:5] = True
    given = features.arguments(is_visual, [embeds[0, i % 4 : i % 4 + 3] for i in range(len(features.layers))])
    return given, features.addends(given, embeds)


def _sample(more: TokenInput, embeds: torch.Tensor) -> torch.Tensor:
    """Values that are not all the same, whole ones of 0 and 1."""
    none = more.none(embeds)
    values = torch.arange(none.numel(), device=embeds.device).view(none.shape) % 7
    return values.to(none.dtype) / 7 if none.is_floating_point() else values.to(none.dtype) % 2


def _sample_inputs(
    decoder: PreTrainedModel, features: LayerFeatures | None, more: tuple[TokenInput, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
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
    if features is not None:
        inputs |= features.none(embeds)
        shapes |= dict.fromkeys(features.inputs, shapes["inputs_embeds"])
    inputs |= {each.name: each.none(embeds) for each in more}
    shapes |= {each.name: shapes["inputs_embeds"] for each in more}
    return inputs, shapes


def _has_multimodal_rope(config: Any) -> bool:
    """Whether positions have a temporal, a vertical and a horizontal part."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return "mrope_section" in parameters
