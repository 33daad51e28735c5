"""The check at capture, on decoders whose attention was changed by hand in ways that the program can't know of."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from tiny_models import llava_config, sharp
from transformers import AttentionInterface, LlavaForConditionalGeneration
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from reroute_fx import UnsupportedModelError
from reroute_fx.capture import capture_decoder, text_decoder
from reroute_fx.capture.captured_decoder import _compare_attention

BY_HAND = "by_hand"

pytestmark = pytest.mark.usefixtures("no_gradients", "one_thread")


@dataclass(frozen=True)
class Parts:
    """Of an attention, of which each may be changed."""

    query: torch.Tensor  # [B, H, S, D]
    key: torch.Tensor  # [B, H, S, D]
    value: torch.Tensor  # [B, H, S, D]
    seen: torch.Tensor  # [S, S]
    scale: float
    bend: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits
    sink: bool = False


def with_rotary_values(parts: Parts) -> Parts:
    half = parts.value.shape[-1] // 2
    angle = torch.arange(len(parts.seen))[:, None] / 10 ** torch.arange(half)
    first, second = parts.value[..., :half], parts.value[..., half:]
    turned = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
    return replace(parts, value=torch.cat(turned, dim=-1))


def with_a_bias(logits: torch.Tensor) -> torch.Tensor:
    """ALiBi's, of a slope of 1/10."""
    place = torch.arange(logits.shape[-1])
    return logits - 0.1 * (place[:, None] - place).abs()


CHANGES: dict[str, Callable[[Parts], Parts]] = {
    "scale": lambda parts: replace(parts, scale=1.05 * parts.scale),
    "mask off by one": lambda parts: replace(parts, seen=torch.ones_like(parts.seen).tril(1)),
    "extra logit": lambda parts: replace(parts, sink=True),
    "dropped head": lambda parts: replace(
        parts, value=parts.value * torch.tensor([0.0, 1, 1, 1])[:, None, None]
    ),
    "swapped keys and values": lambda parts: replace(parts, key=parts.key.flip(1), value=parts.value.flip(1)),
    "bounded logits": lambda parts: replace(parts, bend=lambda logits: 5 * torch.tanh(logits / 5)),
    "added bias": lambda parts: replace(parts, bend=with_a_bias),
    "rotary values": with_rotary_values,
}


def attend(module, query, key, value, attention_mask, scaling, **_):
    repeats = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(repeats, dim=1) for each in (key, value))
    parts = module.change(Parts(query, key, value, attention_mask[0, 0] == 0, scaling))
    logits = parts.bend(parts.query @ parts.key.transpose(-1, -2) * parts.scale)
    logits = logits.masked_fill(~parts.seen, -torch.inf)
    if parts.sink:
        logits = torch.cat([logits, torch.zeros_like(logits[..., :1])], dim=-1)
    weights = logits.softmax(dim=-1)[..., : len(parts.seen)]
    return (weights @ parts.value).transpose(1, 2).contiguous(), None


@pytest.fixture(scope="module")
def captured():
    """A model that attends by hand, and its program."""
    AttentionInterface.register(BY_HAND, attend)
    AttentionMaskInterface.register(BY_HAND, eager_mask)
    model = sharp(LlavaForConditionalGeneration, llava_config(2))
    for layer in text_decoder(model).layers:
        layer.self_attn.change = unchanged
    model.set_attn_implementation({"text_config": BY_HAND})
    return model, capture_decoder(model)


def unchanged(parts: Parts) -> Parts:
    return parts


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_in_the_last_layer_is_noticed(captured, monkeypatch, change):
    """`capture_decoder` ends with this check; written by hand without a change, the fixture passes it."""
    model, program = captured
    decoder = text_decoder(model)
    _compare_attention(decoder, program, model)
    monkeypatch.setattr(decoder.layers[-1].self_attn, "change", change)
    with pytest.raises(UnsupportedModelError, match=r"attends in another way.*by_hand"):
        _compare_attention(decoder, program, model)
