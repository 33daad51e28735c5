"""Tiny models that talk about pictures, their prompts, and ways to ask them."""

import functools

import torch
from tiny_models import END, IMAGE, START, VIDEO, llava_config, qwen3_config, qwen_config
from transformers import (
    GenerationConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
    TextStreamer,
)

import reroute_fx
from reroute_fx import RoutingConfig

MARKERS = (END, START, VIDEO, IMAGE)
PICTURE = [START, *[IMAGE] * 16, END]
GRIDS = [[1, 8, 8], [1, 4, 16]]
"""Patches of a picture of Qwen2.5-VL: 16 tokens that span 4 or 8 rotary positions."""

DECISIONS = (1, 3)
EVERYTHING = RoutingConfig(DECISIONS, (1.0, 1.0))
ROUTING = {
    "llava": RoutingConfig(DECISIONS, (0.5, 0.25)),
    "qwen": RoutingConfig(DECISIONS, (0.6, 0.2), "physical_delete"),
    "qwen3": RoutingConfig(DECISIONS, (0.5, 0.25)),
}
ACTIONS = ("compact_route_stagewise", "compact_route", "physical_delete")
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
"""Twelve tokens, whatever ends an answer."""
NOISE = 1e-4
"""Allowed difference of logits near 8, where float32 has a spacing of 1e-6: a hundred roundings in another order.

Another selection, position or cached token moves them by 1e-1 and more.
"""
MODELS = {
    "llava": (LlavaForConditionalGeneration, llava_config, {}),
    "qwen": (Qwen2_5_VLForConditionalGeneration, qwen_config, {"patch_size": 4, "window_size": 16}),
    "qwen3": (Qwen3VLForConditionalGeneration, qwen3_config, {"patch_size": 4}),
}


def build(family, layers=4, spread=0.5):
    """A model whose weights are spread so far that its next token depends on the picture and on what is kept."""
    torch.manual_seed(0)
    model_class, config, options = MODELS[family]
    model = model_class(config(layers, spread, **options)).eval()
    model.generation_config = GenerationConfig(pad_token_id=0, suppress_tokens=list(MARKERS))
    return model


@functools.cache
def unrouted_model(family):
    return build(family)


@functools.cache
def routed_model(family, config=None):
    config = config or ROUTING[family]
    return reroute_fx.compile(unrouted_model(family), config=config, backend="eager")


def prompt(name, *text, images=1):
    """Token ids of a prompt; `name` is its second token and stands for its pictures."""
    return [1, name, *PICTURE * images, *text]


def batch(family, *rows, pad="left"):
    """Inputs for rows of token ids, padded on one side."""
    ids, mask = padded(rows, pad)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if family != "llava":
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    pictures = [(row[1], row.count(IMAGE) // 16) for row in rows if IMAGE in row]
    if pictures:
        inputs["pixel_values"] = torch.cat([draw(family, name, count) for name, count in pictures])
        if family != "llava":
            grids = [GRIDS[(name + i) % 2] for name, count in pictures for i in range(count)]
            inputs["image_grid_thw"] = torch.tensor(grids)
    return inputs


def padded(rows, pad="left", width=None):
    """Token ids and attention mask ``[B, S]`` of rows."""
    width = width or max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        first = width - len(row) if pad == "left" else 0
        ids[i, first : first + len(row)] = torch.tensor(row)
        mask[i, first : first + len(row)] = 1
    return ids, mask


def draw(family, name, count):
    shape = (count, 3, 16, 16) if family == "llava" else (count * 64, 3 * 2 * 4 * 4)
    return torch.randn(shape, generator=torch.Generator().manual_seed(name))


SINGLE = [prompt(7, 9, 11, 13)]
MIXED = [prompt(7, 9, 11, 13), [1, 5, 17, 23, 29], prompt(6, 31, 8, images=2)]
TEXT = [[1, 5, 17, 23, 29]]
BATCHES = {"single": SINGLE, "padded": MIXED}


def forward_and_steps(model, inputs, tokens):
    """Logits of a prompt and of `tokens` that are fed after it one by one."""
    output = model(**inputs)
    logits = [output.logits]
    for token in tokens:
        step = torch.full_like(inputs["input_ids"][:, :1], token)
        output = model(input_ids=step, past_key_values=output.past_key_values)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def new_tokens(model, inputs, **arguments):
    return model.generate(**inputs, **arguments)[:, inputs["input_ids"].shape[1] :]


def expect_same_answers(found, expected, inputs, tolerance, **options):
    """Of two models to a padded batch: the logits of its tokens, and what they generate."""
    is_token = inputs["attention_mask"].bool()
    logits = [each(**inputs).logits[is_token] for each in (found, expected)]
    torch.testing.assert_close(*logits, atol=tolerance, rtol=0)
    assert torch.equal(*(each.generate(**inputs, **options) for each in (found, expected)))


class Collector(TextStreamer):
    """Keeps the token ids that `generate` streams, and that it ended."""

    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen.extend(value.flatten().tolist())

    def end(self):
        self.seen.append("end")
