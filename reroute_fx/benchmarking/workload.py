"""What a comparison asks of the contenders, checked before anything runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..analysis.routing_report import RoutingReport
from ..capture import text_decoder
from ..errors import ConfigError, InputError, UnsupportedModelError
from ..runtime import RoutedModel
from ..runtime.prompt import Prompt


@dataclass(frozen=True)
class Workload:
    """A batch of prompts and what follows them.

    Attributes:
        inputs: what a processor returned, with an attention mask.
        visual_tokens: of each row.
        text_tokens: of each row.
        new_tokens: that `generate` returns for each row, and steps that are timed one by one.
    """

    inputs: Mapping[str, Any]
    visual_tokens: tuple[int, ...]
    text_tokens: tuple[int, ...]
    new_tokens: int

    @property
    def batch(self) -> int:
        return len(self.visual_tokens)

    @property
    def columns(self) -> int:
        """Length of the prompts, padding included."""
        return int(self.inputs["input_ids"].shape[1])


def check_models(model: Any, routed: Any) -> None:
    """Raise unless `routed` was compiled from `model` and both are where time can be taken."""
    if not isinstance(routed, RoutedModel):
        raise ConfigError(
            f"routed is a {type(routed).__name__}; expected what reroute_fx.compile(model) returned. Compile the "
            f"model first."
        )
    if isinstance(model, RoutedModel):
        raise ConfigError("model is routed already; expected the model that reroute_fx.compile was given.")
    text_decoder(model)
    if {id(p) for p in model.parameters()} != {id(p) for p in routed.parameters()}:
        raise ConfigError(
            "routed doesn't share its parameters with model; expected what reroute_fx.compile made of this very "
            "model. Compile it again, after the last change of its parameters."
        )
    if model.device.type not in ("cpu", "cuda"):
        raise UnsupportedModelError(
            f"model is on {model.device}; expected a CPU or a CUDA device. Move it there and compile it again."
        )


def read_workload(routed: Any, inputs: Any, new_tokens: int) -> Workload:
    """The rows of `inputs`, refused where routed and unrouted calls would not do the same work."""
    if not isinstance(inputs, Mapping):
        raise InputError(
            f"inputs is a {type(inputs).__name__}; expected the mapping that a processor returns."
        )
    given = dict(inputs)
    prompt = routed._reader.read(given, routed.device)
    if not isinstance(prompt, Prompt):
        raise InputError(
            "inputs hold no image or video tokens at the start of a conversation; expected at least one row with "
            "pixel_values and its placeholders in input_ids, and no past_key_values. Put an image into the prompt."
        )
    if given.get("attention_mask") is None:
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    if (given["attention_mask"][:, -1] == 0).any():
        raise InputError(
            "attention_mask marks padding behind a row; expected padding in front, as generate needs it. Set "
            "processor.tokenizer.padding_side = 'left'."
        )
    visual = tuple(map(sum, prompt.plan.images))
    text = tuple(length - v for length, v in zip(prompt.plan.lengths, visual, strict=True))
    return Workload(given, visual, text, new_tokens)


def check_count(name: str, value: object, *, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} is {value!r}; expected a whole number of {least} or more.")


def check_memory(model: Any, report: RoutingReport, work: Workload) -> None:
    """Raise when the comparison would probably not fit into what is free now."""
    needed, free = needed_bytes(model, report, work), free_bytes(model.device)
    if free is not None and needed > free:
        raise InputError(
            f"The comparison needs about {needed / 2**20:,.0f} MiB for caches and activations of {work.batch} rows "
            f"with {work.columns} + {work.new_tokens} tokens, but {free / 2**20:,.0f} MiB are free on {model.device}; "
            f"expected less. Use fewer rows, shorter prompts or fewer new_tokens."
        )


def needed_bytes(model: Any, report: RoutingReport, work: Workload) -> int:
    """Bytes of the caches of all three contenders, of one layer's activations and of the last logits.

    Caches are counted together though only those of one contender and of its growth live at once: the vision tower
    and what a compiler holds back are not known beforehand.
    """
    text = model.config.get_text_config(decoder=True)
    caches = 0
    for visual in work.visual_tokens:
        others = work.columns - visual + work.new_tokens + 1
        row = report.at(visual_tokens=visual, text_tokens=others)
        caches += 2 * row.unrouted.kv_bytes + (row.routed if visual else row.unrouted).kv_bytes
    # Residual stream, normed, queries, keys, values and their sum; gate, up and product of the feed-forward block.
    widths = 6 * text.hidden_size + 3 * getattr(text, "intermediate_size", 4 * text.hidden_size)
    activations = work.batch * work.columns * widths * report.element_bytes
    logits = 2 * 4 * work.batch * text.vocab_size
    return int(caches + activations + logits)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that new tensors can take, None where the system doesn't say."""
    if device.type == "cuda":
        held_back = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held_back
    facts = Path("/proc/meminfo")
    if not facts.exists():
        return None
    lines = (line.split() for line in facts.read_text().splitlines())
    return next((int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:"), None)
