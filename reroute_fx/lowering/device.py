"""What a device has to offer before anything is compiled for it."""

from importlib import metadata

import torch
from torch.export import ExportedProgram

from ..errors import BackendUnavailableError, UnsupportedModelError

OLDEST_TRITON = (3, 6)
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
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError as error:
        raise BackendUnavailableError(
            f"Triton is not installed; expected {_dotted(OLDEST_TRITON)} or later for a model on {device}. Run "
            f"pip install 'reroute-fx[gpu]'."
        ) from error
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        raise BackendUnavailableError(
            f"Triton is {version}; expected {_dotted(OLDEST_TRITON)} or later for a model on {device}. Install the "
            f"Triton that belongs to torch 2.11 or later."
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
