"""The demo: two small models with random weights, built here, on generated pictures.

Random weights show that routing works and what it saves, not what a model sees.
"""

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from .api import compile
from .config import TIERS
from .passes import ACTIONS
from .pictures import picture

QUESTION = "Where is the red circle left of the blue square?"
_IMAGE, _VISION_START, _VISION_END = "<image>", "<|vision_start|>", "<|vision_end|>"
_WIDTH, _LAYERS, _HEADS = 512, 16, 8
_ROUNDS = 5


@dataclass(frozen=True)
class Example:
    """A model and one prompt for it."""

    model: Any
    inputs: dict[str, torch.Tensor]
    tokenizer: Any


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on the demo's own sentences."""
    special = ["<unk>", "<s>", "</s>", "<pad>", _IMAGE, _VISION_START, _VISION_END]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([f"USER: \n{QUESTION} ASSISTANT: It is below the green circle."], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=[_IMAGE, _VISION_START, _VISION_END],
    )


def llava_example(seed: int = 0) -> Example:
    """A LLaVA with the picture geometry of LLaVA-1.5: 336 pixels, 576 visual tokens."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=_WIDTH,
        intermediate_size=_WIDTH * 8 // 3,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS,
    )
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=336,
        patch_size=14,
    )
    image_id = tokenizer.convert_tokens_to_ids(_IMAGE)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_id)
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token=_IMAGE,
        num_additional_image_tokens=1,
    )
    prompt = f"USER: {_IMAGE}\n{QUESTION} ASSISTANT:"
    inputs = processor(images=picture(seed), text=prompt, return_tensors="pt")
    return Example(model.eval(), dict(inputs), tokenizer)


def qwen_example(seed: int = 0) -> Example:
    """A Qwen2.5-VL: image size as it comes, grouped-query attention, multimodal rotary positions."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    image_id = tokenizer.convert_tokens_to_ids(_IMAGE)
    head_dim = _WIDTH // _HEADS
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": _WIDTH,
        "intermediate_size": _WIDTH * 8 // 3,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": 2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [head_dim // 8, head_dim * 3 // 16, head_dim * 3 // 16],
        },
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": _WIDTH,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=image_id,
        vision_start_token_id=tokenizer.convert_tokens_to_ids(_VISION_START),
        vision_end_token_id=tokenizer.convert_tokens_to_ids(_VISION_END),
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    images = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=576 * 28 * 28)
    pixels = images(images=[picture(seed, (672, 504))], return_tensors="pt")
    features = int(pixels["image_grid_thw"].prod()) // images.merge_size**2
    placeholders = _VISION_START + _IMAGE * features + _VISION_END
    words = tokenizer(f"USER: {placeholders}{QUESTION} ASSISTANT:", return_tensors="pt")
    inputs = {
        "input_ids": words["input_ids"],
        "attention_mask": words["attention_mask"],
        "mm_token_type_ids": (words["input_ids"] == image_id).int(),
        **dict(pixels),
    }
    return Example(model.eval(), inputs, tokenizer)


def run(backend: str = "inductor", console: Console | None = None) -> None:
    """Compile both models at the three tiers, generate, compare actions and time the prefill."""
    console = console or Console()
    torch._logging.set_logs(all=logging.ERROR)  # type: ignore[attr-defined]
    for name, build in (("LLaVA", llava_example), ("Qwen2.5-VL", qwen_example)):
        example = build()
        console.rule(f"{name} with random weights, {_WIDTH} wide, {_LAYERS} layers")
        _show(example, backend, console)


def _show(example: Example, backend: str, console: Console) -> None:
    routed = {}
    for tier in track(TIERS, description="compiling", console=console, transient=True):
        routed[tier] = compile(example.model, tier=tier, backend=backend)
        _prefill(routed[tier], example.inputs)()
    console.print(routed[128].report)
    console.print(_agreement_table(example, console))
    console.print(_time_table(example, routed, backend, console))


def _agreement_table(example: Example, console: Console) -> Table:
    """How far the actions agree at tier 128, against the stagewise one."""
    names = list(reversed(ACTIONS))
    outputs, words = {}, {}
    for action in track(names, description="comparing actions", console=console, transient=True):
        model = compile(example.model, tier=128, action=action, backend="eager")
        outputs[action] = _prefill(model, example.inputs)()
        words[action] = model.generate(**example.inputs, max_new_tokens=8, do_sample=False)[0, -8:]
    reference = names[0]
    table = Table(title="Agreement with stagewise routing")
    table.add_column("action", no_wrap=True)
    for heading in ("last logits", "generated", "kept at the end"):
        table.add_column(heading)
    for action in names:
        logits = (outputs[action].logits[0, -1] - outputs[reference].logits[0, -1]).abs().max()
        same = int((words[action] == words[reference]).sum())
        kept = _kept(outputs[action]) & _kept(outputs[reference])
        total = len(_kept(outputs[reference]))
        table.add_row(
            action, f"differ by {logits:.1e}", f"{same} of 8 equal", f"{len(kept)} of {total} shared"
        )
    return table


def _kept(output: Any) -> set[int]:
    """Kept visual tokens of the last decision, counted in the whole prompt."""
    last = output.routing.config.decision_layers[-1]
    return set(output.routing.all_kept[last][0].nonzero().flatten().tolist())


def _time_table(example: Example, routed: dict[int, Any], backend: str, console: Console) -> Table:
    runs = {"eager": _prefill(example.model, example.inputs)}
    if backend == "inductor":
        runs["torch.compile"] = _prefill(torch.compile(example.model), example.inputs)
    runs |= {f"routed {tier}": _prefill(model, example.inputs) for tier, model in routed.items()}
    for warm_up in track(runs.values(), description="compiling", console=console, transient=True):
        warm_up()
        warm_up()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in track(range(_ROUNDS), description="measuring", console=console, transient=True):
        for name, call in runs.items():
            seconds[name].append(_timed(call))
    table = Table("", "median ms", "x eager", "theory", title="Prefill with vision tower")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        tier = name.removeprefix("routed ")
        theory = _theory(routed[int(tier)]) if tier.isdigit() else ""
        table.add_row(name, f"{1e3 * median:.0f}", f"{medians['eager'] / median:.2f}", theory)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _theory(model: Any) -> str:
    return f"{model.report.unrouted.flops / model.report.routed.flops:.2f}"


def _prefill(model: Any, inputs: dict[str, torch.Tensor]) -> Callable[[], Any]:
    return torch.no_grad()(lambda: model(**inputs, logits_to_keep=1))


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
