"""Visual features that are added inside the decoder: what becomes of tokens that wait meanwhile, on random weights.

    python benchmarks/deepstack.py [--seeds 4] [--prompts 16]

Compares, at an equal mean number of visual tokens, three ways to route a tiny Qwen3-VL, which adds features behind its
first three layers: decisions from the second layer on, where waiting tokens get their features when they come back;
the same where they never get them; and decisions behind the last addition only. Records the mean divergence (KL) of the
next token from the unrouted model, in results/deepstack.json. The weights are random: this says how far each is from
the unrouted model, nothing about answers.
"""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from record import RESULTS, write
from rich.console import Console
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

import reroute_fx
from reroute_fx import RoutingConfig, pipeline
from reroute_fx.passes import route_stages

LAYERS, BUDGET = 12, 0.4
IMAGE, GRID = 50, (1, 16, 16)
TOKENS = 64


def flat(*layers: int) -> RoutingConfig:
    """One ratio at all decisions, such that BUDGET of the visual tokens enter a layer on average."""
    ratio = (BUDGET * LAYERS - layers[0]) / (LAYERS - layers[0])
    return RoutingConfig(layers, (ratio,) * len(layers))


@contextmanager
def never_added() -> Iterator[None]:
    with patch.object(route_stages, "_waiting", lambda edit, stream, layers: stream):
        yield


def build(seed: int) -> Any:
    torch.manual_seed(seed)
    text = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        "initializer_range": 0.2,
    }
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "out_hidden_size": 64,
        "patch_size": 4,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1, 2],
        "initializer_range": 0.2,
    }
    ids = {
        "image_token_id": IMAGE,
        "video_token_id": 49,
        "vision_start_token_id": 48,
        "vision_end_token_id": 47,
    }
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=text, vision_config=vision, **ids)
    ).eval()


def prompts(count: int) -> list[dict[str, torch.Tensor]]:
    found = []
    for seed in range(count):
        random = torch.Generator().manual_seed(seed)
        text = torch.randint(3, 40, (8,), generator=random).tolist()
        ids = torch.tensor([[1, 48, *[IMAGE] * TOKENS, 47, *text]])
        pixels = torch.randn(4 * TOKENS, 3 * 2 * 4 * 4, generator=random)
        found.append(
            {
                "input_ids": ids,
                "pixel_values": pixels,
                "image_grid_thw": torch.tensor([GRID]),
                "mm_token_type_ids": (ids == IMAGE).int(),
            }
        )
    return found


def divergence(model: Any, routed: Any, given: dict[str, torch.Tensor]) -> float:
    """KL of the next token's distribution, in nats."""
    theirs, ours = (each(**given).logits[0, -1].double().log_softmax(0) for each in (model, routed))
    return float((theirs.exp() * (theirs - ours)).sum())


@torch.no_grad()
def main(
    seeds: Annotated[int, typer.Option(help="models")] = 4,
    prompts_each: Annotated[int, typer.Option("--prompts", help="prompts for each")] = 16,
) -> None:
    early, late = flat(1, 2, 4, 8), flat(3, 5, 8)
    ways = {
        "added when they come back": early,
        "never added": early,
        "decisions behind the last addition": late,
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for seed in range(seeds):
        model = build(seed)
        for name, config in ways.items():
            with never_added() if name == "never added" else nullcontext():
                # Programs are kept for models that are alike; another seed is one.
                pipeline._programs.cache_clear()
                routed = reroute_fx.compile(model, config=config, backend="eager")
            found[name].append(
                statistics.fmean(divergence(model, routed, given) for given in prompts(prompts_each))
            )
    result = {
        "average share of visual tokens": BUDGET,
        "decision layers": {"early": early.decision_layers, "late": late.decision_layers},
        "mean divergence of each model": found,
        "mean": {name: statistics.fmean(values) for name, values in found.items()},
    }
    path = write("deepstack", result, RESULTS)
    Console().print(result["mean"], f"{path}")


if __name__ == "__main__":
    typer.run(main)
