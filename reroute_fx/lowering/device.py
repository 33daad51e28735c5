"""What a device has to offer before anything is compiled for it."""

import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from .._compat import package_version
from ..errors import BackendUnavailableError, UnsupportedModelError

OLDEST_TRITON = (3, 6)
TRITON_PACKAGES = ("triton", "pytorch-triton")
"""The second comes with nightly builds of torch."""
OLDEST_CAPABILITY = (8, 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_device(device: torch.device, dtype: torch.dtype) -> None:
    """Raise unless programs of `dtype` can run on `device`.

    Raises:
        UnsupportedModelError: another kind of device, or a dtype that the Triton kernels don't take.
        BackendUnavailableError: a GPU that is too old, or no Triton for it.
    """
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise UnsupportedModelError(
            f"model is on {device}; expected a CPU or an NVIDIA GPU. Call model.to('cpu') or model.to('cuda')."
        )
    if dtype not in DTYPES:
        raise UnsupportedModelError(
            f"model has dtype {dtype} on {device}; expected one of {[str(d) for d in DTYPES]}. Load it with "
            f"dtype=torch.bfloat16."
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        raise BackendUnavailableError(
            f"{torch.cuda.get_device_name(device)} has compute capability {_dotted(capability)}; expected "
            f"{_dotted(OLDEST_CAPABILITY)} or later. Use a newer GPU, or run on CPU."
        )
    version = next(filter(None, map(package_version, TRITON_PACKAGES)), None)
    if version is None:
        raise BackendUnavailableError(
            f"Triton is not installed; expected {_dotted(OLDEST_TRITON)} or later for a model on {device}. Run "
            f"pip install 'reroute-fx[gpu]'."
        )
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        raise BackendUnavailableError(
            f"Triton is {version}; expected {_dotted(OLDEST_TRITON)} or later for a model on {device}. Install the "
            f"Triton that belongs to torch 2.11 or later."
        )


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """What is launched inside goes to `device`: Triton asks which one is current, not where its tensors lie."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def check_cuda_toolkit() -> None:
    """Raise BackendUnavailableError unless programs for a GPU can be compiled ahead of time.

    What torch compiles around their kernels includes CUDA's headers, which don't come with it.
    """
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc")
    home = Path(named or (Path(found).parents[1] if found else "/usr/local/cuda"))
    missing = [str(path) for path in (home / "bin/nvcc", home / "include/cuda.h") if not path.exists()]
    if missing:
        raise BackendUnavailableError(
            f"{' and '.join(missing)} not found (CUDA_HOME is {named or 'not set'}); expected the CUDA toolkit, with "
            f"which programs for a GPU are compiled ahead of time. Install the one of torch.version.cuda="
            f"{torch.version.cuda}, with nvcc and headers, and set CUDA_HOME to its folder."
        )


def describe_operators(device: torch.device) -> str:
    """Which implementation of the `reroute::` operators runs on `device`, and why."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return f"Triton kernels, compute capability {_dotted(capability)}"
    return f"PyTorch references, because the model is on {device.type}"


def program_device(program: ExportedProgram) -> torch.device:
    """Where a program runs: on the device of its inputs."""
    fakes = [node.meta["val"] for node in program.graph.find_nodes(op="placeholder")]
    device: torch.device = next(fake.device for fake in fakes if isinstance(fake, torch.Tensor))
    return device


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
