"""Models with random weights and the proportions of real ones, for benchmarks."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from reroute_fx.loading.models_by_name import CHECKPOINT


def build(width: int, layers: int, image_size: int = 336) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights: the proportions of a 7B decoder, a tower at next to no cost.

    Its pictures are of `image_size`, with a visual token for each 14 x 14 pixels: 576.
    """
    torch.manual_seed(0)
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=int(width * 2.6875),
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        vocab_size=1000,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=14,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=999)
    return LlavaForConditionalGeneration(config).eval()


def save_with_processor(folder: Path, width: int, layers: int) -> None:
    """Write a model of `build` that can be served: in words of the model that ships, pictures in 576 tokens."""
    model, processor = build(width, layers), AutoProcessor.from_pretrained(CHECKPOINT)
    size, words = model.config.vision_config.image_size, processor.tokenizer
    processor.image_processor.size = {"shortest_edge": size}
    processor.image_processor.crop_size = {"height": size, "width": size}
    model.resize_token_embeddings(len(words))
    model.config.image_token_id = words.convert_tokens_to_ids(processor.image_token)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


QWEN_TOKENS = {
    "image_token_id": 999,
    "video_token_id": 998,
    "vision_start_token_id": 997,
    "vision_end_token_id": 996,
}


def build_qwen(width: int, layers: int) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL with random weights, grouped-query attention and a vision tower that costs next to nothing."""
    torch.manual_seed(0)
    heads = width // 64
    text = {
        "hidden_size": width,
        "intermediate_size": int(width * 2.6875),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "vocab_size": 1000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": width,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        **QWEN_TOKENS,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def build_qwen3(width: int, layers: int) -> Qwen3VLForConditionalGeneration:
    """A Qwen3-VL with random weights: four heads to a key, features added behind its first three layers."""
    torch.manual_seed(0)
    heads = width // 64
    text = {
        "hidden_size": width,
        "intermediate_size": width * 3,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "head_dim": 64,
        "vocab_size": 1000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [12, 10, 10]},
    }
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": width,
        "deepstack_visual_indexes": [0, 1, 2],
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        **QWEN_TOKENS,
    )
    return Qwen3VLForConditionalGeneration(config).eval()


def build_gemma(width: int, layers: int) -> Gemma3ForConditionalGeneration:
    """A Gemma 3 with random weights: of six layers five see a window, which is narrower than a prompt of 576 tokens.

    A picture has 144 visual tokens, which see each other.
    """
    torch.manual_seed(0)
    heads = width // 64
    text = {
        "hidden_size": width,
        "intermediate_size": width * 4,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "sliding_window": 256,
        "vocab_size": 1000,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 168,
        "patch_size": 14,
    }
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=144,
        image_token_index=999,
        boi_token_index=998,
        eoi_token_index=997,
    )
    return Gemma3ForConditionalGeneration(config).eval()


def llava_prompts(
    model: LlavaForConditionalGeneration, batch: int, images: int, text: int
) -> dict[str, torch.Tensor]:
    """Inputs of equal rows: `images` pictures and `text` tokens in each.

    A picture has as many visual tokens as the model's tower makes of one.
    """
    config, vision = model.config, model.config.vision_config
    tokens = images * (vision.image_size // vision.patch_size) ** 2
    ids = torch.tensor([[1, *[config.image_token_id] * tokens, *range(5, 5 + text - 1)]] * batch)
    pixels = torch.randn(batch * images, 3, vision.image_size, vision.image_size)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def qwen_prompts(
    model: Qwen2_5_VLForConditionalGeneration, sizes: Sequence[tuple[Sequence[tuple[int, int]], int]]
) -> dict[str, torch.Tensor]:
    """Inputs of a batch, padded on the left.

    Args:
        model: from `build_qwen`.
        sizes: for each row the images, as height and width in merged patches, and the number of text tokens.
    """
    config, merge = model.config, model.config.vision_config.spatial_merge_size
    rows, grids = [], []
    for images, text in sizes:
        row = [5]
        for height, width in images:
            grids.append([1, height * merge, width * merge])
            row += [config.vision_start_token_id, *[config.image_token_id] * (height * width)]
            row += [config.vision_end_token_id]
        rows.append(row + list(range(6, 6 + text - 1 - 2 * len(images))))
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    is_token = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    patches = sum(t * h * w for t, h, w in grids)
    vision = config.vision_config
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "input_ids": ids,
        "attention_mask": is_token,
        "mm_token_type_ids": (ids == config.image_token_id).int(),
        "pixel_values": torch.randn(patches, values),
        "image_grid_thw": torch.tensor(grids),
    }
