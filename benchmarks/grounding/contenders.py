"""What the grounding study compares: a model's ways to run on fewer visual tokens, and answers from each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import reroute_fx
from reroute_fx.grounding.questions import Question
from reroute_fx.grounding.scenes import Scene

TIERS = {192: 1 / 3, 128: 2 / 9, 64: 1 / 9}
"""Share of the visual tokens that enter a layer on average, by the tier's name at 576."""
POOLED = {192: (8, 6), 128: (8, 4), 64: (4, 4)}
"""Columns and rows of 12 x 12 tokens after average pooling."""
ACTIONS = {"deleted": "physical_delete", "routed": "compact_route_stagewise"}
OTHERS = {
    "fastv-official-k3": (192, 128, 64),
    "pdrop-official": (192,),
    "feather": (192,),
    "value-similarity": (192, 128, 64),
    "coverage": (192, 128, 64),
    "two-scale": (192, 128, 64),
}
"""Other methods, and the tiers that their first decision lets them reach."""
BATCH = 24


@dataclass(frozen=True)
class Contender:
    """A way to answer.

    Attributes:
        name: such as "pdrop routed".
        tier: 192, 128 or 64; None for the unrouted model.
        answer: inputs to what `generate` returns, and what was routed.
    """

    name: str
    tier: int | None
    answer: Callable[[dict[str, torch.Tensor]], tuple[torch.Tensor, Any]]


def make_inputs(processor: Any, prompts: Sequence[tuple[Scene, Question]]) -> dict[str, torch.Tensor]:
    texts = [f"USER: <image>\n{question.text} ASSISTANT:" for _, question in prompts]
    pictures = [here.picture for here, _ in prompts]
    return dict(processor(images=pictures, text=texts, padding=True, return_tensors="pt"))


def unrouted(model: Any) -> Contender:
    """The model as it is."""
    return Contender("unrouted", None, _generate(lambda: model))


def contenders(model: Any, seed: int, folder: Path) -> list[Contender]:
    """All of them, the unrouted model first; tuned ones if `tune_checkpoint.py` wrote configurations into `folder`."""
    found = [unrouted(model)]
    for tier, share in TIERS.items():
        for method in ("fastv", "pdrop"):
            for name, action in ACTIONS.items():
                routed = _compiled(model, tier=share, method=method, action=action)
                found.append(Contender(f"{method} {name}", tier, _generate(routed)))
                if method == "fastv":
                    found.append(Contender(f"random {name}", tier, _generate(routed, RandomScores(seed))))
        found.append(Contender("average pooling", tier, _pooled(model, POOLED[tier])))
        for method in (name for name, tiers in OTHERS.items() if tier in tiers):
            routed = _compiled(model, tier=share, method=method)
            found.append(Contender(f"{method} routed", tier, _generate(routed)))
        if (config := folder / f"tuned_{tier}.json").exists():
            routed = _compiled(model, config=config)
            found.append(Contender("tuned routed", tier, _generate(routed)))
    return found


def _compiled(model: Any, **choices: Any) -> Callable[[], Any]:
    """The routed model, compiled when it is first asked: a study that goes on has most answers."""
    return cache(lambda: reroute_fx.compile(model, backend="eager", **choices))


class RandomScores(TorchDispatchMode):
    """While it is on, visual tokens are scored by chance."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.reroute.visual_scores.default:
            chance = torch.rand(result.shape, generator=self.generator)
            return chance.masked_fill(result == -torch.inf, -torch.inf)
        return result


def _generate(
    model: Callable[[], Any], scores: RandomScores | None = None
) -> Callable[..., tuple[torch.Tensor, Any]]:
    def answer(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
        answering = model()
        with torch.no_grad():
            if scores is None:
                return _answer(answering, inputs)
            with scores:
                return _answer(answering, inputs)

    return answer


def _answer(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
    seen = []
    hook = model.register_forward_hook(lambda _, __, output: seen.append(getattr(output, "routing", None)))
    try:
        tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    finally:
        hook.remove()
    return tokens[:, inputs["input_ids"].shape[1] :], seen[0]


def _pooled(model: Any, size: tuple[int, int]) -> Callable[..., tuple[torch.Tensor, Any]]:
    """The unrouted model on averages of neighbouring visual tokens, each at the position of its middle."""
    columns, rows = size

    def answer(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        is_image = ids == model.config.image_token_id
        side = int(is_image[0].sum().item() ** 0.5)
        with torch.no_grad():
            features = model.model.get_image_features(inputs["pixel_values"]).pooler_output
            grid = torch.stack(tuple(features)).transpose(1, 2).unflatten(2, (side, side))
            pooled = F.adaptive_avg_pool2d(grid, (rows, columns)).flatten(2).transpose(1, 2)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            middle = middles(side, rows)[:, None] * side + middles(side, columns)
            first = positions[is_image].view(len(ids), -1)[:, :1]
            embeds = model.get_input_embeddings()(ids)
            parts = []
            for row in range(len(ids)):
                start = int(is_image[row].nonzero()[0])
                end = start + side * side
                parts.append(
                    (
                        torch.cat([embeds[row, :start], pooled[row], embeds[row, end:]]),
                        torch.cat(
                            [positions[row, :start], first[row] + middle.flatten(), positions[row, end:]]
                        ),
                        torch.cat([mask[row, : start + rows * columns], mask[row, end:]]),
                    )
                )
            joined, places, seen = (torch.stack(part) for part in zip(*parts, strict=True))
            tokens = _greedy(model, joined, places, seen, 16)
        return tokens, None

    return answer


def middles(side: int, cells: int) -> torch.Tensor:
    return ((torch.arange(cells) + 0.5) * side / cells).long()


def _greedy(model: Any, embeds: Any, positions: Any, mask: Any, count: int) -> torch.Tensor:
    """Greedy answers at positions of one's own, which `generate` can't count on from."""
    end, cache, tokens = model.generation_config.eos_token_id, None, []
    for _ in range(count):
        out = model(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        if tokens:
            token = token.masked_fill((torch.cat(tokens, 1) == end).any(1, keepdim=True), end)
        tokens.append(token)
        embeds = model.get_input_embeddings()(token)
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return torch.cat(tokens, 1)
