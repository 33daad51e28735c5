"""Section ``artifacts`` of the GPU benchmark: golden vectors from artifacts and, where it is there, from TensorRT."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gpu_golden import CASES, check_output, exact_products, load_golden

import reroute_fx
from reroute_fx import Limits
from reroute_fx.errors import BackendUnavailableError
from reroute_fx.lowering.tensorrt import check_tensorrt, coverage

LIMITS = Limits(batch=2, length=512, image_tokens=256)


def check_artifact(name: str, device: torch.device, tiny: bool) -> dict[str, Any]:
    """Export the golden model `name`, load it and ask it.

    Returns:
        Seconds, bytes, and the largest error of the last logits; selections and cache lengths have to be equal.
    """
    golden, case = load_golden(name), CASES[0]
    routed = reroute_fx.compile(golden.model.to(device), config=golden.config(case), backend="eager")
    # A dry run shows that all steps fit together; ONNX takes a quarter of the time there.
    format = "onnx" if tiny else "aot"
    with TemporaryDirectory() as folder, exact_products():
        start = time.perf_counter()
        path = reroute_fx.export(routed, Path(folder, name), format=format, limits=LIMITS)
        exported = time.perf_counter()
        loaded = reroute_fx.load(path, device=device)
        ready = time.perf_counter()
        return {
            "export_s": exported - start,
            "load_s": ready - exported,
            "bytes": loaded.report.total_bytes,
            "weight_bytes": loaded.report.manifest.weight_bytes,
            "error": check_output(golden, case, loaded, device),
        }


def check_engines(name: str, device: torch.device) -> dict[str, Any]:
    """The golden model `name` on TensorRT: what is left to PyTorch, and the largest error; or why it can't be run."""
    golden, case = load_golden(name), CASES[0]
    config = golden.config(case)
    found = coverage(reroute_fx.compile(golden.model.to(device), config=config, backend="eager"))
    facts = {"list": found.source, "left": [operator.name for operator in found.left]}
    try:
        check_tensorrt(device)
    except BackendUnavailableError as error:
        return {**facts, "not_run": str(error)}
    start = time.perf_counter()
    routed = reroute_fx.compile(golden.model, config=config, backend="tensorrt", limits=LIMITS)
    built = time.perf_counter() - start
    return {**facts, "build_s": built, "error": check_output(golden, case, routed, device)}
