"""Tiny models with random weights of known families, through their own classes, and prompts for them."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers
from transformers.models.exaone4_5 import modeling_exaone4_5 as exaone
from transformers.models.qwen3_omni_moe import configuration_qwen3_omni_moe as qwen3_omni_config
from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as qwen3_omni

IMAGE, VIDEO, START, END, VIDEO_START, VIDEO_END, AUDIO_TOKEN = range(50, 43, -1)
LAYERS = 4
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
FULL = {"layer_types": ["full_attention"] * LAYERS}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
GRIDS = {
    "depth": 2,
    "hidden_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "intermediate_size": 32,
    "patch_size": 4,
}
CLIP, SIGLIP = ({**VISION, "model_type": f"{kind}_vision_model"} for kind in ("clip", "siglip"))
PIXTRAL = {**VISION, "model_type": "pixtral", "head_dim": 8}
SQUARE = {**VISION, "image_size": [16, 16], "patch_size": [4, 4]}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
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
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 2.5, 3.0, 4.0],
    "original_max_position_embeddings": 64,
}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
}
GLM_MOE = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LLAMA, QWEN_2 = ({**GROUPED, "model_type": kind} for kind in ("llama", "qwen2"))
QWEN_3 = {**HEADS, "model_type": "qwen3"}
QWEN_3_MOE = {**HEADS, **EXPERTS, "model_type": "qwen3_moe"}
COHERE_2 = {**GROUPED, "model_type": "cohere2"}
MISTRAL, MINISTRAL = (
    {**HEADS, "model_type": kind, "sliding_window": None} for kind in ("mistral", "ministral3")
)
GLM = {**HEADS, "rope_parameters": PARTIAL}
GLM_VISION = {**GRIDS, "image_size": 32}
OVIS = {**VISION, "hidden_stride": 2, "vocab_size": 20, "num_visual_indicator_tokens": 5}
GOT = {**VISION, "output_channels": 8, "mlp_dim": 32, "global_attn_indexes": [1], "window_size": 2}
DEEPSTACK = {**GRIDS, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
GEMMA_4 = {
    **HEADS,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "global_head_dim": 16,
}
GEMMA_4_VISION = {
    **{name: size for name, size in VISION.items() if name != "image_size"},
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pooling_kernel_size": 2,
    "position_embedding_size": 16,
}
AUDIO = {
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "num_mel_bins": 16,
}
IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_token_index": IMAGE,
    "video_token_index": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": VIDEO_START,
    "video_end_token_id": VIDEO_END,
}


def squares(count: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(count, 3, 16, 16)}


def crops(count: int) -> dict[str, torch.Tensor]:
    """Each picture whole, and in one tile."""
    return {
        "pixel_values": torch.randn(count, 2, 3, 16, 16),
        "image_sizes": torch.full((count, 2), 16),
    }


def tiles(count: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(count, 1, 3, 16, 16)}


def patches(count: int, edge: int = 6) -> dict[str, torch.Tensor]:
    """So many patches along each edge, with their places."""
    rows, columns = torch.meshgrid(torch.arange(edge), torch.arange(edge), indexing="ij")
    places = torch.stack([columns.flatten(), rows.flatten()], dim=-1)
    return {
        "pixel_values": torch.rand(count, edge * edge, 3 * 4 * 4),
        "image_position_ids": places.repeat(count, 1, 1),
    }


def sized(count: int) -> dict[str, torch.Tensor]:
    return {**squares(count), "image_sizes": torch.full((count, 2), 16)}


def packed(count: int) -> dict[str, torch.Tensor]:
    """16 patches of each picture."""
    return {
        "pixel_values": torch.randn(count, 16, 3 * 4 * 4),
        "spatial_shapes": torch.full((count, 2), 4),
        "pixel_attention_mask": torch.ones(count, 16, dtype=torch.int64),
    }


def clips(count: int) -> dict[str, torch.Tensor]:
    return {"pixel_values_videos": torch.randn(count, 2, 3, 16, 16)}


def grids(count: int, values: tuple[int, ...] = (3 * 2 * 4 * 4,), edge: int = 8) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.randn(count * edge * edge, *values),
        "image_grid_thw": torch.tensor([[1, edge, edge]] * count),
    }


def grid_clips(count: int, values: tuple[int, ...] = (3 * 2 * 4 * 4,)) -> dict[str, torch.Tensor]:
    return {
        "pixel_values_videos": torch.randn(count * 32, *values),
        "video_grid_thw": torch.tensor([[2, 4, 4]] * count),
    }


Pictures = Callable[[int], dict[str, torch.Tensor]]


def find(name: str) -> Any:
    """A class of transformers, also of those modules whose names it doesn't give itself."""
    for place in (transformers, qwen3_omni_config, qwen3_omni, exaone):
        if hasattr(place, name):
            return getattr(place, name)
    raise AttributeError(f"transformers {transformers.__version__} has no {name}")


@dataclass(frozen=True)
class Family:
    """How a model of a family is built and what it is given.

    Attributes:
        config: name of its config's class, less "Config".
        text: options of the decoder's config.
        more: its own options.
        pictures: inputs of so many pictures.
        videos: inputs of so many videos; None if it takes none.
        model: name of its class; None for the one for conditional generation.
        stamps: whether there is text between the frames of a video.
        frames_are_images: whether the frames of a video have the placeholders of images.
        sees_all: whether all tokens of a prompt see each other, which types of 0 say.
    """

    config: str
    text: Any
    more: Mapping[str, Any] = field(default_factory=dict)
    pictures: Pictures = squares
    videos: Pictures | None = None
    model: str | None = None
    stamps: bool = False
    frames_are_images: bool = False
    sees_all: bool = False

    def build(self) -> Any:
        """The model, with weights so large that attention is not uniform and the ranking not rounding."""
        torch.manual_seed(0)
        config = find(f"{self.config}Config")(text_config=self.text, **{**IDS, **self.more})
        model = find(self.model or f"{self.config}ForConditionalGeneration")(config).eval()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.mul_(10)
        return model


def prompts(model: Any, family: Family, videos: bool = False) -> dict[str, torch.Tensor]:
    """Two rows of different lengths, padded on the left, with a picture or a video each."""
    torch.manual_seed(3)
    make = family.videos if videos else family.pictures
    assert make is not None
    given = make(2)
    count = features(model, given, videos) // 2
    picture = _video(family, count) if videos else [START, *[IMAGE] * count, END]
    ids = torch.tensor([[1, 7, *picture, 9, 11, 13], [0, 0, 3, *picture, 5, 6]])
    is_visual = (ids == IMAGE) | (ids == VIDEO)
    of_tokens = {
        "mm_token_type_ids": is_visual.int() * (2 if videos else 1),
        "moe_mm_token_type_ids": (is_visual | (ids == START) | (ids == END)).int(),
        "token_type_ids": is_visual.long() * (not family.sees_all),
    }
    takes = inspect.signature(type(model).forward).parameters
    given |= {name: tensor for name, tensor in of_tokens.items() if name in takes}
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), **given}


def _video(family: Family, count: int) -> list[int]:
    """A video of two frames."""
    if not family.stamps:
        return [START, *[VIDEO] * count, END]
    token = IMAGE if family.frames_are_images else VIDEO
    frame = [token] * (count // 2)
    return [VIDEO_START, *frame, 12, *frame, VIDEO_END]


@torch.no_grad()
def features(model: Any, given: Mapping[str, torch.Tensor], videos: bool) -> int:
    """How many features the model makes of pictures or videos."""
    inner = model if hasattr(model, "get_image_features") else model.base_model
    inner = model.base_model if videos and not hasattr(inner, "get_video_features") else inner
    encode = inner.get_video_features if videos else inner.get_image_features
    takes = inspect.signature(encode).parameters
    made = encode(**{name: tensor for name, tensor in given.items() if name in takes or "kwargs" in takes})
    made = getattr(made, "pooler_output", made)
    each = made if isinstance(made, (list, tuple)) else [made]
    return sum(part.shape[:-1].numel() for part in each)


def row(given: Mapping[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    """One row of `prompts`, without padding."""
    real = given["attention_mask"][number].bool()
    rows = len(given["input_ids"])
    alone = {}
    for name, tensor in given.items():
        if tensor.shape[:2] == real.expand(rows, -1).shape:
            alone[name] = tensor[number : number + 1, real]
        else:
            size = len(tensor) // rows
            alone[name] = tensor[number * size : (number + 1) * size]
    return alone


def llava(kind: str, text: dict[str, Any]) -> Family:
    """LLaVA over another decoder."""
    config = getattr(transformers, f"{kind}Config")(**text)
    return Family("Llava", config, {"vision_config": CLIP})


def qwen(
    config: str, text: dict[str, Any], vision: dict[str, Any] = GRIDS, model: str | None = None, **more: Any
) -> Family:
    """Pictures and videos of any size."""
    more = {"vision_config": vision, **more}
    stamps = config.startswith("Qwen3")
    return Family(config, {"rope_parameters": ROPE, **text}, more, grids, grid_clips, model, stamps=stamps)


FAMILIES: dict[str, Family] = {
    "LLaVA over Llama": llava("Llama", GROUPED),
    "LLaVA over Llama 3.1": llava("Llama", {**GROUPED, "rope_parameters": LLAMA_3}),
    "LLaVA over yarn": llava("Llama", {**GROUPED, "max_position_embeddings": 256, "rope_parameters": YARN}),
    "LLaVA over dynamic NTK": llava("Llama", {**GROUPED, "rope_parameters": DYNAMIC}),
    "LLaVA over Mistral without window": llava("Mistral", {**GROUPED, "sliding_window": None}),
    "LLaVA over Mistral": llava("Mistral", {**GROUPED, "sliding_window": 8}),
    "LLaVA over Qwen2": llava("Qwen2", GROUPED),
    "LLaVA over Qwen3": llava("Qwen3", HEADS),
    "LLaVA over Qwen3-MoE": llava("Qwen3Moe", {**HEADS, **EXPERTS}),
    "LLaVA over Mixtral": llava("Mixtral", {**GROUPED, "num_local_experts": 4, "sliding_window": None}),
    "LLaVA over OLMo 2": llava("Olmo2", GROUPED),
    "LLaVA over Gemma": llava("Gemma", HEADS),
    "LLaVA over Gemma 2 without windows": llava(
        "Gemma2", {**HEADS, **FULL, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
    ),
    "LLaVA over Granite": llava("Granite", GROUPED),
    "LLaVA over Cohere": llava("Cohere", GROUPED),
    "LLaVA over GPT-NeoX": llava("GPTNeoX", SIZES),
    "LLaVA over Phi 3": llava("Phi3", GROUPED),
    "LLaVA over Phi 3 longrope": llava("Phi3", {**GROUPED, "rope_parameters": LONG}),
    "LLaVA over SmolLM 3": llava("SmolLM3", GROUPED),
    "LLaVA over GPT-OSS without windows": llava("GptOss", {**HEADS, **FULL, "num_local_experts": 4}),
    "LLaVA over Granite SWA without windows": llava("GraniteSWA", {**HEADS, **FULL}),
    "LLaVA over DeepSeek-V2": llava("DeepseekV2", {**SIZES, **LATENT, "topk_method": "greedy"}),
    "LLaVA over DeepSeek-V3": llava("DeepseekV3", {**SIZES, **LATENT}),
    "LLaVA-NeXT": Family(
        "LlavaNext", LLAMA, {"vision_config": CLIP, "image_grid_pinpoints": [[16, 16]]}, crops
    ),
    "LLaVA-NeXT-Video": Family(
        "LlavaNextVideo", LLAMA, {"vision_config": CLIP, "image_grid_pinpoints": [[16, 16]]}, crops, clips
    ),
    "LLaVA-OneVision": Family(
        "LlavaOnevision", QWEN_2, {"vision_config": SIGLIP, "image_grid_pinpoints": [[16, 16]]}, crops, clips
    ),
    "VipLLaVA": Family("VipLlava", LLAMA, {"vision_config": CLIP, "vision_feature_layers": [-1, -2]}),
    "Video-LLaVA": Family(
        "VideoLlava",
        LLAMA,
        {"vision_config": CLIP},
        lambda n: {"pixel_values_images": squares(n)["pixel_values"]},
        clips,
    ),
    "InternVL over Qwen2": Family("InternVL", QWEN_2, {"vision_config": SQUARE}),
    "InternVL over Qwen3": Family("InternVL", QWEN_3, {"vision_config": SQUARE}),
    "InternVL over Qwen3-MoE": Family("InternVL", QWEN_3_MOE, {"vision_config": SQUARE}),
    "SmolVLM": Family("SmolVLM", LLAMA, {"vision_config": VISION, "scale_factor": 2}, lambda n: tiles(n)),
    "Idefics3": Family("Idefics3", LLAMA, {"vision_config": VISION, "scale_factor": 2}, lambda n: tiles(n)),
    "Mistral 3": Family("Mistral3", MISTRAL, {"vision_config": PIXTRAL}, sized),
    "Ministral 3": Family("Mistral3", MINISTRAL, {"vision_config": PIXTRAL}, sized),
    "LightOnOCR": Family("LightOnOcr", QWEN_3, {"vision_config": PIXTRAL}, sized),
    "GOT-OCR 2": Family("GotOcr2", QWEN_2, {"vision_config": GOT}, squares),
    "Aya Vision without windows": Family("AyaVision", {**COHERE_2, **FULL}, {"vision_config": SIGLIP}),
    "Cohere2 Vision without windows": Family(
        "Cohere2Vision", {**COHERE_2, **FULL}, {"vision_config": SIGLIP, "alignment_intermediate_size": 64}
    ),
    "Aya Vision": Family("AyaVision", {**COHERE_2, "sliding_window": 8}, {"vision_config": SIGLIP}),
    "GLM-4.1V": Family(
        "Glm4v", GLM, {"vision_config": GLM_VISION}, grids, grid_clips, stamps=True, frames_are_images=True
    ),
    "GLM-4.6V": Family(
        "Glm46V",
        {**GLM, "model_type": "glm4v_text"},
        {"vision_config": GLM_VISION},
        grids,
        grid_clips,
        stamps=True,
        frames_are_images=True,
    ),
    "GLM-4.5V": Family(
        "Glm4vMoe",
        {**GLM, **GLM_MOE},
        {"vision_config": GLM_VISION},
        grids,
        grid_clips,
        stamps=True,
        frames_are_images=True,
    ),
    "Qwen2-VL": qwen(
        "Qwen2VL",
        GROUPED,
        {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
    ),
    "Qwen2.5-VL": qwen("Qwen2_5_VL", GROUPED),
    "Qwen3-VL": qwen("Qwen3VL", HEADS, DEEPSTACK),
    "Qwen3-VL-MoE": qwen("Qwen3VLMoe", {**HEADS, **EXPERTS}, DEEPSTACK),
    "Qwen3.5": qwen(
        "Qwen3_5",
        {**HEADS, "layer_types": ["linear_attention", "full_attention"] * 2},
        {**GRIDS, "num_position_embeddings": 64},
    ),
    "Qwen2.5-Omni": Family(
        "Qwen2_5OmniThinker",
        {**GROUPED, "rope_parameters": ROPE},
        {"vision_config": GRIDS, "audio_config": {**AUDIO, "output_dim": 32}},
        grids,
        model="Qwen2_5OmniThinkerForConditionalGeneration",
    ),
    "Qwen3-Omni": qwen(
        "Qwen3OmniMoeThinker",
        {**HEADS, **EXPERTS},
        {**DEEPSTACK, "image_size": 64},
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        audio_config={**AUDIO, "output_dim": 32, "downsample_hidden_size": 8},
    ),
    "Exaone 4.5": qwen(
        "Exaone4_5_",
        {**HEADS, "model_type": "exaone4", "sliding_window": 8, "rope_parameters": PLAIN},
        {**GRIDS, "num_key_value_heads": 1},
    ),
    "Exaone 4.5 without windows": qwen(
        "Exaone4_5_",
        {**HEADS, **FULL, "model_type": "exaone4", "sliding_window": None, "rope_parameters": PLAIN},
        {**GRIDS, "num_key_value_heads": 1},
    ),
    "GLM-OCR": Family("GlmOcr", {**HEADS, "rope_parameters": PARTIAL}, {"vision_config": GLM_VISION}, grids),
    "Ovis2": Family("Ovis2", QWEN_2, {"vision_config": OVIS, "hidden_size": 32, "vocab_size": 64}),
    "DeepSeek-VL": Family("DeepseekVL", LLAMA, {"vision_config": SIGLIP}),
    "Janus": Family(
        "Janus",
        LLAMA,
        {
            "vision_config": {**VISION, "projection_dim": 32, "num_image_tokens": 16},
            "vq_config": {
                "num_patches": 4,
                "projection_dim": 32,
                "base_channels": 32,
                "latent_channels": 16,
                "num_embeddings": 32,
                "image_token_embed_dim": 32,
            },
        },
    ),
    "PaddleOCR-VL": Family(
        "PaddleOCRVL",
        {**HEADS, "rope_parameters": ROPE},
        {"vision_config": {**VISION, "image_size": 56, "patch_size": 14}},
        partial(grids, values=(3, 14, 14), edge=4),
    ),
    "Kimi K2.5": Family(
        "Kimi_K25",
        {**SIZES, **LATENT, "model_type": "deepseek_v3"},
        {
            "vision_config": {**VISION, "pos_emb_height": 8, "pos_emb_width": 8},
            "projection_hidden_size": 16,
            "tie_word_embeddings": False,
        },
        partial(grids, values=(3, 4, 4), edge=4),
    ),
    "Ernie 4.5 VL": Family(
        "Ernie4_5_VLMoe",
        {
            **GROUPED,
            "rope_parameters": ROPE,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": [16, 16],
        },
        {"vision_config": GRIDS},
        partial(grids, values=(48,)),
    ),
    "MiniMax M3 without blocks": Family(
        "MiniMaxM3VL",
        {
            **HEADS,
            **FULL,
            "rotary_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "dense_intermediate_size": 64,
            "shared_intermediate_size": 16,
        },
        {"vision_config": VISION, "projector_hidden_size": 32},
        partial(grids, values=(96,)),
        model="MiniMaxM3SparseForConditionalGeneration",
    ),
    "Video-LLaMA 3": Family(
        "VideoLlama3",
        QWEN_2,
        {"vision_config": VISION},
        lambda n: {**grids(n, values=(48,)), "image_merge_sizes": torch.full((n,), 2)},
    ),
    "Gemma 3": Family(
        "Gemma3", {**HEADS, "sliding_window": 8}, {"vision_config": SIGLIP, "mm_tokens_per_image": 4}
    ),
    "Gemma 4": Family(
        "Gemma4",
        {
            **GEMMA_4,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 64,
        },
        {"vision_config": GEMMA_4_VISION, "audio_token_id": AUDIO_TOKEN},
        patches,
    ),
    "Gemma 4 with experts": Family(
        "Gemma4",
        {
            **GEMMA_4,
            "use_bidirectional_attention": "vision",
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 16,
        },
        {"vision_config": GEMMA_4_VISION, "audio_token_id": AUDIO_TOKEN},
        patches,
    ),
    "PaliGemma": Family(
        "PaliGemma",
        {**HEADS, "model_type": "gemma"},
        {"vision_config": SIGLIP, "projection_dim": 32},
        sees_all=True,
    ),
    "PaliGemma 2": Family(
        "PaliGemma",
        {**HEADS, "model_type": "gemma2"},
        {"vision_config": SIGLIP, "projection_dim": 32},
        sees_all=True,
    ),
    "Llama 4": Family(
        "Llama4",
        {**HEADS, "num_local_experts": 4, "intermediate_size_mlp": 64},
        {
            "vision_config": {
                **VISION,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
            }
        },
    ),
    "Mllama": Family(
        "Mllama",
        {
            **GROUPED,
            "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        {
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 2,
                "image_size": 16,
                "patch_size": 4,
                "vision_output_dim": 32,
                "intermediate_layers_indices": [0],
            }
        },
    ),
    "LFM2-VL": Family(
        "Lfm2Vl",
        {**GROUPED, "layer_types": ["conv", "full_attention"] * 2},
        {"vision_config": {**VISION, "num_patches": 16}, "projector_hidden_size": 32},
        packed,
    ),
}
"""By name."""
