"""Which families of models are captured, proved and routed: tiny ones with random weights, on CPU.

    python benchmarks/families.py [--known-as FILE]

Records for each "routed" or the refusal, in results/families.json. `--known-as` takes an earlier record, whose
outcomes are kept beside the new ones: what was routed then has to be routed now.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from record import RESULTS, write
from rich.console import Console
from rich.progress import track

import reroute_fx
from reroute_fx import RerouteError, RoutingConfig
from reroute_fx.errors import first_line

LAYERS = 4
ROUTING = RoutingConfig((2,), (0.5,))
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
GRIDS = {"depth": 2, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32, "intermediate_size": 32}
CLIP, SIGLIP = ({**VISION, "model_type": f"{kind}_vision_model"} for kind in ("clip", "siglip"))
PIXTRAL = {**VISION, "model_type": "pixtral", "head_dim": 8}
SQUARE = {**VISION, "image_size": [16, 16], "patch_size": [4, 4]}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
PARTIAL = {**ROPE, "partial_rotary_factor": 1.0}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA, QWEN_2 = ({**GROUPED, "model_type": kind} for kind in ("llama", "qwen2"))
QWEN_3 = {**HEADS, "model_type": "qwen3"}
QWEN_3_MOE = {**HEADS, **EXPERTS, "model_type": "qwen3_moe"}
MISTRAL, MINISTRAL = (
    {**HEADS, "model_type": kind, "sliding_window": None} for kind in ("mistral", "ministral3")
)
GLM_MOE = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
OVIS = {**VISION, "hidden_stride": 2, "vocab_size": 20, "num_visual_indicator_tokens": 5}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", GROUPED),
    "Llama 3.1": ("Llama", {**GROUPED, "rope_parameters": LLAMA_3}),
    "yarn": ("Llama", {**GROUPED, "max_position_embeddings": 256, "rope_parameters": YARN}),
    "Mistral without window": ("Mistral", {**GROUPED, "sliding_window": None}),
    "Qwen2": ("Qwen2", GROUPED),
    "Qwen3": ("Qwen3", HEADS),
    "Qwen3-MoE": ("Qwen3Moe", {**HEADS, **EXPERTS}),
    "Mixtral": ("Mixtral", {**GROUPED, "num_local_experts": 4, "sliding_window": None}),
    "OLMo 2": ("Olmo2", GROUPED),
    "Gemma": ("Gemma", HEADS),
    "Granite": ("Granite", GROUPED),
    "Cohere": ("Cohere", GROUPED),
    "GPT-NeoX": ("GPTNeoX", SIZES),
    "Phi 3": ("Phi3", {**GROUPED, "pad_token_id": 0}),
    "SmolLM 3": ("SmolLM3", {**GROUPED, "pad_token_id": 0}),
}
"""Under LLaVA: name of the config, its options."""

MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "InternVL over Qwen2": ("InternVL", QWEN_2, {"vision_config": SQUARE}),
    "InternVL over Qwen3": ("InternVL", QWEN_3, {"vision_config": SQUARE}),
    "InternVL over Qwen3-MoE": ("InternVL", QWEN_3_MOE, {"vision_config": SQUARE}),
    "LLaVA-NeXT": ("LlavaNext", LLAMA, {"vision_config": CLIP}),
    "LLaVA-OneVision": ("LlavaOnevision", QWEN_2, {"vision_config": SIGLIP}),
    "VipLLaVA": ("VipLlava", LLAMA, {"vision_config": CLIP, "vision_feature_layers": [-1, -2]}),
    "SmolVLM": ("SmolVLM", LLAMA, {"vision_config": VISION}),
    "Idefics3": ("Idefics3", LLAMA, {"vision_config": VISION}),
    "Mistral 3": ("Mistral3", MISTRAL, {"vision_config": PIXTRAL}),
    "Ministral 3": ("Mistral3", MINISTRAL, {"vision_config": PIXTRAL}),
    "GLM-4.1V": ("Glm4v", {**HEADS, "rope_parameters": PARTIAL}, {"vision_config": GRIDS}),
    "GLM-4.5V": ("Glm4vMoe", {**HEADS, **GLM_MOE, "rope_parameters": PARTIAL}, {"vision_config": GRIDS}),
    "GLM-4.6V": (
        "Glm46V",
        {**HEADS, "rope_parameters": PARTIAL, "model_type": "glm4v_text"},
        {"vision_config": GRIDS},
    ),
    "Qwen2.5-VL": ("Qwen2_5_VL", {**GROUPED, "rope_parameters": ROPE}, {"vision_config": GRIDS}),
    "Ovis2": ("Ovis2", QWEN_2, {"vision_config": OVIS, "hidden_size": 32, "vocab_size": 64}),
    "DeepSeek-VL": ("DeepseekVL", LLAMA, {"vision_config": VISION}),
    "Janus": ("Janus", LLAMA, {}),
    "PaddleOCR-VL": (
        "PaddleOCRVL",
        {**HEADS, "rope_parameters": ROPE},
        {"vision_config": {**VISION, "image_size": 56, "patch_size": 14}},
    ),
    "Qwen3-VL": ("Qwen3VL", {**HEADS, "rope_parameters": ROPE}, {}),
    "Qwen3-VL-MoE": ("Qwen3VLMoe", {**HEADS, **EXPERTS, "rope_parameters": ROPE}, {}),
}
"""Name of the config, options of the decoder's config, and of its own."""


def llava(kind: str, options: dict[str, Any]) -> Any:
    text = getattr(transformers, f"{kind}Config")(**options)
    config = transformers.LlavaConfig(vision_config=CLIP, text_config=text, image_token_index=50)
    return transformers.LlavaForConditionalGeneration(config)


def model(kind: str, text: dict[str, Any], options: dict[str, Any]) -> Any:
    config = getattr(transformers, f"{kind}Config")(text_config=text, **options)
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def families() -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {
        f"LLaVA over {name}": lambda given=given: llava(*given) for name, given in DECODERS.items()
    }
    return found | {name: lambda given=given: model(*given) for name, given in MODELS.items()}


def outcome(build: Callable[[], Any]) -> str:
    """Both programs are made, for prompts and for what follows, and run for a check of the attention."""
    torch.manual_seed(0)
    try:
        reroute_fx.compile(build().eval(), config=ROUTING, backend="eager")
    except RerouteError as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return "routed"


def main(known_as: Annotated[Path | None, typer.Option(help="An earlier record.")] = None) -> None:
    known = json.loads(known_as.read_text())["families"] if known_as else {}
    start, results = time.perf_counter(), {}
    for name, build in track(families().items(), console=Console(stderr=True), transient=True):
        before = {"before": known[name]["now"]} if name in known else {}
        results[name] = {"now": outcome(build), **before}
    path = write("families", {"families": results, "seconds": round(time.perf_counter() - start)}, RESULTS)
    routed = sum(result["now"] == "routed" for result in results.values())
    Console().print(f"{routed} of {len(results)} routed: {path}")


if __name__ == "__main__":
    typer.run(main)
