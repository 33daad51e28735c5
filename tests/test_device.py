"""What is refused before anything is compiled for a device, and what the report says about it."""

import types

import pytest
import torch
from tiny_models import tiny_llava

import reroute_fx
from reroute_fx import BackendUnavailableError, ConfigError, UnsupportedModelError
from reroute_fx.lowering import check_device, describe_operators, device

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU and Triton, as far as their versions are asked for."""
    machine = types.SimpleNamespace(capability=(9, 0), triton="3.7.1")

    def version(name):
        if machine.triton is None:
            raise device.metadata.PackageNotFoundError(name)
        return machine.triton

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: machine.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(
        device,
        "metadata",
        types.SimpleNamespace(version=version, PackageNotFoundError=device.metadata.PackageNotFoundError),
    )
    return machine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_supported_gpu_is_accepted(gpu, dtype):
    check_device(CUDA, dtype)
    assert describe_operators(CUDA) == "Triton kernels, compute capability 9.0"


def test_old_gpu(gpu):
    gpu.capability = (7, 5)
    with pytest.raises(BackendUnavailableError, match=r"Some GPU has compute capability 7\.5; expected 8\.0"):
        check_device(CUDA, torch.float16)


def test_no_triton(gpu):
    gpu.triton = None
    with pytest.raises(
        BackendUnavailableError, match=r"Triton is not installed; expected 3\.6.*reroute-fx\[gpu\]"
    ):
        check_device(CUDA, torch.float16)


def test_old_triton(gpu):
    gpu.triton = "3.5.1"
    with pytest.raises(BackendUnavailableError, match=r"Triton is 3\.5\.1; expected 3\.6"):
        check_device(CUDA, torch.float16)


def test_dtype_without_a_kernel(gpu):
    with pytest.raises(UnsupportedModelError, match=r"dtype torch\.float64 on cuda:0; expected one of"):
        check_device(CUDA, torch.float64)


def test_other_devices():
    with pytest.raises(UnsupportedModelError, match=r"model is on mps; expected a CPU or an NVIDIA GPU"):
        check_device(torch.device("mps"), torch.float16)


def test_on_cpu_the_references_run_because_of_the_device():
    check_device(torch.device("cpu"), torch.float64)
    report = reroute_fx.compile(tiny_llava(), backend="eager").report
    assert report.operators == "PyTorch references, because the model is on cpu"
    assert report.operators in str(report)
    assert report.to_dict()["operators"] == report.operators


def test_cuda_graphs_need_a_gpu():
    with pytest.raises(
        ConfigError, match=r"cuda_graphs is True, but the model is on cpu; expected a model on cuda"
    ):
        reroute_fx.compile(tiny_llava(), cuda_graphs=True)
