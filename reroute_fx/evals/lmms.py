"""A routed model as lmms-eval asks it.

lmms-eval --model reroute_fx --model_args pretrained=llava-hf/llava-1.5-7b-hf,tier=128,action=compact_route_stagewise

Wrappers of lmms-eval log what goes wrong and score an empty answer; this one raises, because a broken model must not
look like a bad one.
"""

from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from .. import api
from ..errors import ConfigError, InputError
from ..loading.models_by_name import AUTO, choose_device, load_model, read_routing
from ..loading.prompts import render_chat

_MAX_NEW_TOKENS = 1024


class RerouteFx(lmms):
    """Args:
    pretrained: model id or folder, or ``"demo"``.
    tier, method, action, schedule, pool, config: see `reroute_fx.compile`, with its defaults; ``method=none`` is the
        same compiler without routing, and ``config`` the path of a JSON file.
    revision: branch, tag or commit of a model id.
    backend: ``"inductor"`` or ``"eager"``.
    device: ``"auto"``, the default: a GPU if there is one; ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
    dtype: ``"auto"``, ``"float32"``, ``"bfloat16"`` or ``"float16"``.
    max_pixels: most pixels of a picture, for processors that have such a limit. The paper's numbers for Qwen take
        451584, 576 visual tokens of 28 x 28 pixels.
    batch_size: prompts in each call.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        tier: float | None = None,
        method: str | None = None,
        action: str | None = None,
        schedule: str | None = None,
        pool: str | None = None,
        config: str | None = None,
        revision: str | None = None,
        backend: str = "inductor",
        device: str | None = None,
        dtype: str = "auto",
        max_pixels: int | None = None,
        batch_size: int | str = 1,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ConfigError(f"model_args has {sorted(unknown)}; expected {_ARGUMENTS}.")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(f"batch_size is {batch_size!r}; expected a whole number of 1 or more.")
        device = choose_device(device or AUTO, dtype)
        routing = read_routing(
            pretrained,
            revision,
            tier=None if tier is None else float(tier),
            method=method,
            action=action,
            schedule=schedule,
            pool=pool,
            config=config,
        )
        loaded = load_model(pretrained, device, dtype, revision)
        self.processor, self.batch = loaded.processor, int(batch_size)
        self.processor.tokenizer.padding_side = "left"
        if max_pixels is not None:
            _limit_pixels(self.processor, int(max_pixels))
        self.model = api.compile(loaded.model, config=routing, backend=backend)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests; requests of one batch have the same generation arguments."""
        results: dict[int, GenerationResult] = {}
        for batch in tqdm(_batches(requests, self.batch), desc="reroute_fx"):
            answers = self._answer([requests[i].args for i in batch])
            results.update(zip(batch, answers, strict=True))
        return [results[i] for i in range(len(requests))]

    def _answer(self, requests: list[tuple[Any, ...]]) -> list[GenerationResult]:
        chats = [
            ChatMessages(messages=to_messages(self.task_dict[task][split][doc_id]))
            for _, to_messages, _, doc_id, task, split in requests
        ]
        media = [chat.extract_media() for chat in chats]
        if any(videos or sounds for _, videos, sounds in media):
            raise InputError(
                "A task has videos or sounds; expected pictures and text only. Choose another task."
            )
        texts = [render_chat(self.processor, _plain(chat)) for chat in chats]
        pictures = [images for images, _, _ in media]
        inputs = self.processor(
            text=texts, images=pictures if any(pictures) else None, padding=True, return_tensors="pt"
        )
        inputs = inputs.to(self.model.device, self.model.dtype)
        wanted = requests[0][2]
        with torch.no_grad():
            tokens = self.model.generate(**inputs, **_generation(wanted))
        new = tokens[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        return [
            GenerationResult(text=_cut(text, wanted), token_counts=TokenCounts(output_tokens=len(row)))
            for text, row in zip(texts, new, strict=True)
        ]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("reroute_fx has no log-likelihoods yet; choose tasks that generate.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("reroute_fx has no tasks of several rounds yet; choose others.")


_ARGUMENTS = (
    "pretrained, tier, method, action, schedule, pool, config, revision, backend, device, dtype, max_pixels and "
    "batch_size"
)


def _batches(requests: list[Instance], size: int) -> list[list[int]]:
    """Numbers of requests with the same generation arguments, `size` at a time."""
    groups: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
        groups.setdefault(repr(request.args[2]), []).append(number)
    return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]


def _generation(wanted: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` out of a task's."""
    sampling = float(wanted.get("temperature") or 0) > 0
    arguments = {
        "max_new_tokens": wanted.get("max_new_tokens", _MAX_NEW_TOKENS),
        "num_beams": wanted.get("num_beams", 1),
        "do_sample": sampling,
    }
    if sampling:
        arguments |= {name: wanted[name] for name in ("temperature", "top_p", "top_k") if wanted.get(name)}
    return arguments


def _cut(text: str, wanted: dict[str, Any]) -> str:
    """The answer up to the first of a task's stop words."""
    stops = wanted.get("until") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop else text
    return text.strip()


def _plain(chat: Any) -> list[dict[str, Any]]:
    """Messages as chat templates take them, pictures as placeholders."""
    return [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part.text} if part.type == "text" else {"type": part.type}
                for part in message.content
            ],
        }
        for message in chat.messages
    ]


def _limit_pixels(processor: Any, max_pixels: int) -> None:
    images = processor.image_processor
    if not hasattr(images, "max_pixels"):
        raise ConfigError(
            f"max_pixels is {max_pixels}, but {type(images).__name__} has no such limit. Leave it out."
        )
    images.max_pixels = max_pixels
    images.size = {**images.size, "longest_edge": max_pixels}
