"""Section ``models`` of the GPU benchmark: models of 7B shapes with random weights, and what is compared."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from hook_routing import HookRouting
from models import llava_prompts, qwen_prompts
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

import reroute_fx
from reroute_fx import RoutingConfig
from reroute_fx.benchmarking.contender import Contender
from reroute_fx.capture import text_decoder
from reroute_fx.capture.copies import copy_sharing_weights

TIERS = (192, 128, 64)
IMAGE = 999
ROUTING_KERNELS = ("_split_logits", "_mean_over_heads", "_rank", "_place", "_copy_rows", "_write_rows")
"""Beginnings of the names of this project's kernels on the device."""


def build_llava(device: torch.device, dtype: torch.dtype, tiny: bool) -> LlavaForConditionalGeneration:
    """LLaVA-1.5-7B's shapes."""
    text = {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }
    if tiny:
        text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 16, "num_attention_heads": 4}
        vision = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=84 if tiny else 336, patch_size=14),
        text_config=LlamaConfig(**text, vocab_size=1000 if tiny else 32064),
        image_token_index=IMAGE,
    )
    return _build(LlavaForConditionalGeneration, config, device, dtype)


def build_qwen(device: torch.device, dtype: torch.dtype, tiny: bool) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL-7B's shapes."""
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    text |= {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
    vision["out_hidden_size"] = text["hidden_size"]
    sections = [16, 24, 24]
    if tiny:
        text |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 16, "vocab_size": 1000}
        text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        vision = {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
        }
        sections = [2, 3, 3]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    config = Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=998,
        vision_start_token_id=997,
        vision_end_token_id=996,
    )
    return _build(Qwen2_5_VLForConditionalGeneration, config, device, dtype)


def _build(model_class: Any, config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = model_class(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def on_device(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inputs where the model is, pixels in its dtype."""
    placed = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    return {**placed, "pixel_values": placed["pixel_values"].to(model.dtype)}


@dataclass(frozen=True)
class Setting:
    """A model and the prompts that it is measured on, by number of visual tokens."""

    name: str
    build: Callable[[torch.device, torch.dtype, bool], Any]
    prompts: Callable[[Any, int, bool], Iterator[tuple[int, dict[str, torch.Tensor]]]]


def _llava_prompts(model: Any, batch: int, tiny: bool) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    for images in (1,) if tiny else (1, 4):
        inputs = on_device(model, llava_prompts(model, batch, images, 64))
        yield int((inputs["input_ids"][0] == IMAGE).sum()), inputs


def _qwen_prompts(model: Any, batch: int, tiny: bool) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    for side in (6,) if tiny else (24, 48):
        yield side * side, on_device(model, qwen_prompts(model, [([(side, side)], 64)] * batch))


SETTINGS = {
    "llava-1.5-7b": Setting("llava-1.5-7b", build_llava, _llava_prompts),
    "qwen2.5-vl-7b": Setting("qwen2.5-vl-7b", build_qwen, _qwen_prompts),
}


def contenders(model: Any, backend: str) -> dict[str, Callable[[], Any]]:
    """How to make each model that is compared; all share the parameters of `model`."""

    def ours(**options: Any) -> Callable[[], Any]:
        return lambda: reroute_fx.compile(model, backend=backend, **options)

    found: dict[str, Callable[[], Any]] = {"eager": lambda: model}
    found["compiled unrouted"] = ours(method="none")
    found |= {f"routed {tier}": ours(tier=tier) for tier in TIERS}
    if model.device.type == "cuda":
        found["compiled unrouted, graphs"] = ours(method="none", cuda_graphs=True)
        found |= {f"routed {tier}, graphs": ours(tier=tier, cuda_graphs=True) for tier in TIERS}
    if backend == "inductor":
        found["torch.compile"] = lambda: with_decoder(model, lambda f: torch.compile(f, dynamic=True))
    return found


def with_decoder(model: Any, change: Callable[[Any], Any]) -> Any:
    """A model that shares everything with `model` but its decoder's forward, which is changed."""
    changed = copy_sharing_weights(model)
    decoder = text_decoder(changed)
    decoder.forward = change(decoder.forward)
    return changed


def hooks(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, Callable[[], Any]]:
    """The eager hook routing; it is bound to the places of the visual tokens."""
    return {f"hooks {tier}": lambda tier=tier: hook_routed(model, tier, inputs) for tier in TIERS}


def hook_routed(model: Any, tier: int, inputs: dict[str, torch.Tensor]) -> Any:
    """The eager hook routing of the visual tokens of `inputs`."""
    hooked = copy_sharing_weights(model)
    decoder = text_decoder(hooked)
    positions = (inputs["input_ids"][0] == IMAGE).nonzero().flatten()
    config = RoutingConfig.from_tier(tier, action="compact_route", num_layers=len(decoder.layers))
    HookRouting(decoder, config, positions)
    return hooked


@contextmanager
def sync_errors(device: torch.device) -> Iterator[None]:
    """Let every wait of the host for the device raise."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def watched_program(model: Any, device: torch.device) -> Iterator[None]:
    """Let every wait of the host raise while the routed prefill runs. A prompt's counts are read before."""
    decoder = text_decoder(model)
    program = decoder.prefill

    def run(**inputs: torch.Tensor) -> Any:
        with sync_errors(device):
            return program(**inputs)

    decoder.prefill = run
    try:
        yield
    finally:
        decoder.prefill = program


def routing_share(contender: Contender) -> float | None:
    """Share of the prefill's device time, without the vision tower, in the kernels of routing; None on CPU."""
    if contender.model.device.type != "cuda":
        return None
    with (
        contender.features.replayed(contender.model),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile,
    ):
        contender.prefill()
        torch.cuda.synchronize(contender.model.device)
    times = {event.key: event.self_device_time_total for event in profile.key_averages()}
    routing = sum(time for name, time in times.items() if name.startswith(ROUTING_KERNELS))
    return routing / sum(times.values())
