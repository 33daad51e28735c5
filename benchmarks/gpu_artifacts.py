"""Section ``artifacts`` of the GPU benchmark: artifacts and, where it is there, TensorRT against the eager graph."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gpu_golden import CASES, exact_products, load_golden

import reroute_fx
from reroute_fx import Limits, RoutingConfig
from reroute_fx.errors import BackendUnavailableError
from reroute_fx.lowering.tensorrt.engines import check_tensorrt, coverage

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from conversations import ROUTING, SINGLE, batch, unrouted_model

LIMITS = Limits(batch=2, length=1024, image_tokens=1024)
LOGITS = 1e-3
"""Allowed difference of logits in float32; of another selection they differ by 1e-1 and more."""


@dataclass(frozen=True)
class Subject:
    """A model with a routing and a prompt."""

    model: Any
    config: RoutingConfig
    inputs: dict[str, torch.Tensor]


def subject(name: str, device: torch.device, tiny: bool) -> Subject:
    """The golden model `name`, or one of four layers in its place."""
    if tiny:
        family = name.partition("2")[0]
        return Subject(unrouted_model(family), ROUTING[family], batch(family, *SINGLE))
    golden = load_golden(name)
    inputs = {key: tensor.to(device) for key, tensor in golden.inputs.items()}
    return Subject(golden.model.to(device), golden.config(CASES[0]), inputs)


def check_artifact(asked: Subject, device: torch.device, tiny: bool) -> dict[str, Any]:
    """Export a model, load it and ask it; seconds, bytes, and the largest difference of the logits."""
    routed = reroute_fx.compile(asked.model, config=asked.config, backend="eager")
    # A dry run shows that all steps fit together; ONNX takes a quarter of the time there.
    format = "onnx" if tiny else "aot"
    with TemporaryDirectory() as folder, exact_products():
        start = time.perf_counter()
        path = reroute_fx.export(routed, Path(folder, "artifact"), format=format, limits=LIMITS)
        exported = time.perf_counter()
        loaded = reroute_fx.load(path, device=device)
        ready = time.perf_counter()
        return {
            "export_s": exported - start,
            "load_s": ready - exported,
            "bytes": loaded.report.total_bytes,
            "weight_bytes": loaded.report.manifest.weight_bytes,
            "difference": difference(loaded, routed, asked.inputs),
        }


def check_engines(asked: Subject, device: torch.device) -> dict[str, Any]:
    """A model on TensorRT: what is left to PyTorch, and the largest difference; or why it can't be run."""
    routed = reroute_fx.compile(asked.model, config=asked.config, backend="eager")
    found = coverage(routed)
    facts = {"list": found.source, "left": [operator.name for operator in found.left]}
    try:
        check_tensorrt(device)
    except BackendUnavailableError as error:
        return {**facts, "not_run": str(error)}
    with exact_products():
        start = time.perf_counter()
        built = reroute_fx.compile(asked.model, config=asked.config, backend="tensorrt", limits=LIMITS)
        seconds = time.perf_counter() - start
        return {**facts, "build_s": seconds, "difference": difference(built, routed, asked.inputs)}


@torch.no_grad()
def difference(found: Any, expected: Any, inputs: dict[str, torch.Tensor]) -> float:
    """Largest difference of the logits of a prompt and of a token behind it; raises if selections differ."""
    outputs = [model(**inputs) for model in (found, expected)]
    for layer, rows in outputs[1].routing.selected.items():
        for ours, theirs in zip(outputs[0].routing.selected[layer], rows, strict=True):
            assert torch.equal(ours, theirs), f"layer {layer}: selections differ"
    token = inputs["input_ids"][:, -1:]
    steps = [
        model(input_ids=token, past_key_values=output.past_key_values)
        for model, output in zip((found, expected), outputs, strict=True)
    ]
    largest = max(float((a.logits - b.logits).abs().max()) for a, b in (outputs, steps))
    assert largest < LOGITS, f"logits differ by {largest:.1e}"
    return largest
