"""Tiny vision-language models with sharp attention, and batches of prompts for them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

PAD, STAMP, END, START, VIDEO, IMAGE = 0, 46, 47, 48, 49, 50
LAYERS = 8
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def llava_config(layers: int, spread: float | None = None, **options: Any) -> LlavaConfig:
    """16 tokens for each image. `spread` is the standard deviation of the initial weights."""
    drawn = {} if spread is None else {"initializer_range": spread}
    vision = CLIPVisionConfig(**VISION, **drawn)
    text = LlamaConfig(**TEXT, num_hidden_layers=layers, **drawn)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, **options)
    return _spread(config, spread)


def qwen_config(layers: int, spread: float | None = None, **vision: Any) -> Qwen2_5_VLConfig:
    """Grouped queries, rotary positions in three dimensions, a token for each 2 x 2 patches of a frame."""
    drawn = {} if spread is None else {"initializer_range": spread}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "num_hidden_layers": layers, "rope_parameters": rope, **drawn},
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
            **drawn,
            **vision,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return _spread(config, spread)


def qwen2_vl() -> Any:
    """The tower before there were windows: every layer sees whole frames."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = Qwen2VLConfig(
        text_config={**TEXT, "num_hidden_layers": 2, "rope_parameters": rope},
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": 32,
            "mlp_ratio": 2,
            "num_heads": 2,
            "patch_size": 4,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return sharp(Qwen2VLForConditionalGeneration, config)


def qwen3_config(layers: int, spread: float | None = None, **vision: Any) -> Qwen3VLConfig:
    """Features of three layers of the tower are added behind the first three of the decoder; positions interleave."""
    drawn = {} if spread is None else {"initializer_range": spread}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 8, "num_hidden_layers": layers, "rope_parameters": rope, **drawn},
        vision_config={
            "depth": 3,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 14,
            "num_position_embeddings": 25,
            "deepstack_visual_indexes": [0, 1, 2],
            **drawn,
            **vision,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return _spread(config, spread)


def _spread(config: Any, spread: float | None) -> Any:
    if spread is not None:
        config.initializer_range = spread
    return config


def tiny_llava() -> Any:
    return sharp(LlavaForConditionalGeneration, llava_config(LAYERS, pad_token_id=PAD))


def tiny_qwen() -> Any:
    return sharp(Qwen2_5_VLForConditionalGeneration, qwen_config(LAYERS, tokens_per_second=4))


def tiny_qwen3() -> Any:
    return sharp(Qwen3VLForConditionalGeneration, qwen3_config(LAYERS))


def sharp(model_class: type, config: Any) -> Any:
    """With initial weights attention is nearly uniform, and the ranking of the visual tokens is rounding."""
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(10)
    return model


@dataclass(frozen=True)
class Picture:
    """An image or a video.

    Attributes:
        token: its placeholder.
        grid: patches in time, height and width.
        size: number of its visual tokens.
        pixels: as the model takes them.
        seconds: between the frames of a video.
        apart: whether there is text between its frames.
    """

    token: int
    grid: tuple[int, int, int]
    size: int
    pixels: torch.Tensor = field(repr=False)
    seconds: float = 1.0
    apart: bool = False

    @property
    def placeholders(self) -> list[int]:
        frame = [self.token] * (self.size // self.grid[0])
        return ([*frame, STAMP] * self.grid[0])[:-1] if self.apart else frame * self.grid[0]


@dataclass(frozen=True)
class Row:
    """A prompt: ids with a placeholder for each visual token, and the pictures in order."""

    ids: tuple[int, ...]
    pictures: tuple[Picture, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(picture.size for picture in self.pictures)

    @property
    def visual_positions(self) -> list[int]:
        return [i for i, token in enumerate(self.ids) if token in (IMAGE, VIDEO)]

    @property
    def pools(self) -> list[int]:
        """Number of the picture of each visual token."""
        return [number for number, size in enumerate(self.sizes) for _ in range(size)]


def llava_image(random: torch.Generator) -> Picture:
    return Picture(IMAGE, (1, 4, 4), 16, torch.randn(1, 3, 16, 16, generator=random))


def qwen_picture(
    random: torch.Generator, grid: tuple[int, int, int], token: int = IMAGE, seconds: float = 1.0
) -> Picture:
    time, height, width = grid
    patches = time * height * width
    # A patch holds 3 colours, 2 neighbouring frames and 14 x 14 pixels.
    pixels = torch.randn(patches, 3 * 2 * 14 * 14, generator=random)
    return Picture(token, grid, patches // 4, pixels, seconds)


def make_row(random: torch.Generator, texts: Sequence[int], pictures: Sequence[Picture]) -> Row:
    """Text and pictures by turns: `texts` are the lengths of the text before, between and behind the pictures."""
    assert len(texts) == len(pictures) + 1
    ids = torch.randint(3, 40, (texts[0],), generator=random).tolist()
    for picture, text in zip(pictures, texts[1:], strict=True):
        ids += picture.placeholders
        ids += torch.randint(3, 40, (text,), generator=random).tolist()
    return Row(tuple(ids), tuple(pictures))


def collate(model: Any, rows: Sequence[Row], side: str = "left", extra: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of a batch as a processor makes them, padded on one side by at least `extra` columns."""
    width = max(len(row.ids) for row in rows) + extra
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        columns = columns_of(row, width, side)
        ids[i, columns], mask[i, columns] = torch.tensor(row.ids), 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    pictures = [picture for row in rows for picture in row.pictures]
    images = [picture for picture in pictures if picture.token == IMAGE]
    videos = [picture for picture in pictures if picture.token == VIDEO]
    if images:
        inputs["pixel_values"] = torch.cat([picture.pixels for picture in images])
    if videos:
        inputs["pixel_values_videos"] = torch.cat([picture.pixels for picture in videos])
    if isinstance(model, (Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration)):
        inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        if images:
            inputs["image_grid_thw"] = torch.tensor([picture.grid for picture in images])
        if videos:
            inputs["video_grid_thw"] = torch.tensor([picture.grid for picture in videos])
            if isinstance(model, Qwen2_5_VLForConditionalGeneration):
                inputs["second_per_grid_ts"] = torch.tensor([picture.seconds for picture in videos])
    return inputs


def columns_of(row: Row, width: int, side: str) -> slice:
    """Where a row lies in a batch of `width` columns."""
    length = len(row.ids)
    return slice(width - length, width) if side == "left" else slice(length)


def byte_tokenizer():
    """A byte-level BPE tokenizer with the special tokens of a LLaVA; it knows every word."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["USER: \nWhat is that? ASSISTANT: It is a circle."], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )
