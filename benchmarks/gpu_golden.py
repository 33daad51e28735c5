"""Golden vectors of the official release, on the device of the GPU benchmark."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import reroute_fx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from golden_models import Golden, load_golden

MODELS = ("llava", "qwen2_5_vl")
CASES = ("pdrop-compact_route_stagewise-128", "fastv-compact_route-64", "pdrop-physical_delete-192")
LOGITS = 1e-4
"""Allowed error of the last logits, as in the tests."""


def check_golden(device: torch.device, tiny: bool) -> dict[str, float]:
    """Largest error of the last logits for each case in float32; selections and cache lengths have to be equal."""
    with exact_products():
        return {
            f"{name}/{case}/{backend}": _check(load_golden(name), case, backend, device)
            for name in MODELS
            for case in (CASES[:1] if tiny else CASES)
            for backend in (("eager",) if tiny else ("eager", "inductor"))
        }


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply in float32, not in TensorFloat-32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _check(golden: Golden, case: str, backend: str, device: torch.device) -> float:
    model = golden.model.to(device)
    routed = reroute_fx.compile(model, config=golden.config(case), backend=backend)
    return check_output(golden, case, routed, device)


@torch.no_grad()
def check_output(golden: Golden, case: str, routed: Any, device: torch.device) -> float:
    """Largest error of the last logits of a routed model; raises if its selections or cache lengths differ."""
    inputs = {name: tensor.to(device) for name, tensor in golden.inputs.items()}
    output, wanted = routed(**inputs), golden.cases[case]
    assert list(output.routing.kv_lengths[0]) == wanted["kv_lengths"]
    for layer, kept in golden.selected(case).items():
        selected = output.routing.selected[layer][0].cpu()
        assert torch.equal(selected, kept), f"{case}: layer {layer}"
    error = float((output.logits[0, -1].cpu() - golden.expected[f"{case}/last_logits"]).abs().max())
    assert error < LOGITS, f"{golden.name}, {case}: last logits off by {error:.1e}"
    return error
