"""The golden models, and what the official Reroute release (9d42204) computes on them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration, Qwen2_5_VLForConditionalGeneration

from reroute_fx import RoutingConfig
from reroute_fx.capture import CapturedDecoder
from reroute_fx.selection.row_plan import plan_rows

GOLDEN = Path(__file__).parent / "golden"
CLASSES = {"llava": LlavaForConditionalGeneration, "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration}


@dataclass(frozen=True)
class Golden:
    """A golden model with its inputs and what the official release computes on it."""

    name: str
    model: Any
    inputs: dict[str, torch.Tensor]
    cases: dict[str, Any]
    expected: dict[str, torch.Tensor]

    def config(self, case: str) -> RoutingConfig:
        given = self.cases[case]
        return RoutingConfig(given["decision_layers"], given["keep_ratios"], given["action"], given["method"])

    @property
    def visual_positions(self) -> torch.Tensor:
        return (self.inputs["input_ids"][0] == self.model.config.image_token_id).nonzero().flatten()

    def selected(self, case: str) -> dict[int, torch.Tensor]:
        """What each decision keeps, in all visual tokens; the release counts in those that deletions have left."""
        pool, found = torch.arange(len(self.visual_positions)), {}
        for layer in self.cases[case]["decision_layers"]:
            found[layer] = pool[self.expected[f"{case}/selected.{layer}"].long()]
            if self.cases[case]["action"] == "physical_delete":
                pool = found[layer]
        return found


def load_golden(name: str) -> Golden:
    folder = GOLDEN / name
    inputs = load_file(folder / "inputs.safetensors")
    inputs["pixel_values"] = (inputs["pixel_values"].float() / 255 - 0.5) / 0.25
    model = CLASSES[name].from_pretrained(folder, dtype=torch.float32).eval()
    cases = json.loads((folder / "cases.json").read_text())["cases"]
    return Golden(name, model, inputs, cases, load_file(folder / "expected.safetensors"))


def decoder_inputs(
    captured: CapturedDecoder, config: RoutingConfig, batch: int = 1, length: int = 90, visual: int = 60
) -> dict[str, torch.Tensor]:
    """Random embeddings for the routed program of a golden model, visual tokens from position 5 on."""
    positions = torch.arange(length).expand(batch, length)
    if captured.position_rank == 3:
        positions = positions.expand(3, batch, length)
    torch.manual_seed(length)
    is_visual = torch.zeros(batch, length, dtype=torch.bool)
    is_visual[:, 5 : 5 + visual] = True
    plan = plan_rows(config, is_visual, [length] * batch, [[visual]] * batch)
    return {
        "inputs_embeds": torch.randn(batch, length, 64),
        "position_ids": positions.contiguous(),
        **plan.inputs,
    }
