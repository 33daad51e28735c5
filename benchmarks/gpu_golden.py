"""Golden vectors of the official release, on the device of the GPU benchmark."""

import sys
from pathlib import Path

import torch

import reroute_fx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from golden_models import Golden, load_golden

CASES = ("pdrop-compact_route_stagewise-128", "fastv-compact_route-64", "pdrop-physical_delete-192")
LOGITS = 1e-4
"""Allowed error of the last logits, as in the tests."""


def check_golden(device: torch.device, tiny: bool) -> dict[str, float]:
    """Largest error of the last logits for each case in float32; selections and cache lengths have to be equal."""
    exact = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        return {
            f"{name}/{case}/{backend}": _check(load_golden(name), case, backend, device)
            for name in ("llava", "qwen2_5_vl")
            for case in (CASES[:1] if tiny else CASES)
            for backend in (("eager",) if tiny else ("eager", "inductor"))
        }
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = exact


@torch.no_grad()
def _check(golden: Golden, case: str, backend: str, device: torch.device) -> float:
    model = golden.model.to(device)
    inputs = {name: tensor.to(device) for name, tensor in golden.inputs.items()}
    routed = reroute_fx.compile(model, config=golden.config(case), backend=backend)
    output, wanted = routed(**inputs), golden.cases[case]
    assert list(output.routing.kv_lengths[0]) == wanted["kv_lengths"]
    for layer in wanted["decision_layers"]:
        selected = output.routing.selected[layer][0].int().cpu()
        assert torch.equal(selected, golden.expected[f"{case}/selected.{layer}"]), f"{case}: layer {layer}"
    error = float((output.logits[0, -1].cpu() - golden.expected[f"{case}/last_logits"]).abs().max())
    assert error < LOGITS, f"{case} on {backend}: last logits off by {error:.1e}"
    return error
