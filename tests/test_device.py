"""What is refused before anything is compiled for a device, and what the report says about it."""

import types
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llava

import reroute_fx
from reroute_fx import BackendUnavailableError, ConfigError, UnsupportedModelError
from reroute_fx.artifact.exporting import check_export
from reroute_fx.lowering import check_device, describe_operators, device

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU and Triton, as far as their versions are asked for."""
    machine = types.SimpleNamespace(capability=(9, 0), packages={"triton": "3.7.1"})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: machine.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(device, "package_version", lambda name: machine.packages.get(name))
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
    gpu.packages = {}
    with pytest.raises(
        BackendUnavailableError, match=r"Triton is not installed; expected 3\.6.*reroute-fx\[gpu\]"
    ):
        check_device(CUDA, torch.float16)


def test_old_triton(gpu):
    gpu.packages = {"triton": "3.5.1"}
    with pytest.raises(BackendUnavailableError, match=r"Triton is 3\.5\.1; expected 3\.6"):
        check_device(CUDA, torch.float16)


def test_triton_of_a_nightly_build(gpu):
    gpu.packages = {"pytorch-triton": "3.7.0+git9f1c2d3"}
    check_device(CUDA, torch.float16)
    gpu.packages = {"pytorch-triton": "3.5.0+git9f1c2d3"}
    with pytest.raises(BackendUnavailableError, match=r"Triton is 3\.5\.0\+git9f1c2d3; expected 3\.6"):
        check_device(CUDA, torch.float16)


@pytest.mark.parametrize("missing", [[], ["bin/nvcc"], ["include/cuda.h"], ["bin/nvcc", "include/cuda.h"]])
@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_the_toolkit_is_there_before_an_export_for_a_gpu(monkeypatch, tmp_path, variable, missing):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    for name in {"bin/nvcc", "include/cuda.h"} - set(missing):
        Path(tmp_path, name).parent.mkdir()
        Path(tmp_path, name).touch()
    check_export("aot", "cpu")
    if not missing:
        check_export("aot", CUDA)
        return
    with pytest.raises(BackendUnavailableError) as raised:
        check_export("aot", "cuda:1")
    assert " and ".join(str(tmp_path / name) for name in missing) + " not found" in str(raised.value)
    assert f"(CUDA_HOME is {tmp_path}); expected the CUDA toolkit" in str(raised.value)


def test_the_toolkit_is_where_nvcc_is(monkeypatch, tmp_path):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name in ("bin/nvcc", "include/cuda.h"):
        Path(tmp_path, name).parent.mkdir()
        Path(tmp_path, name).touch(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    check_export("aot", CUDA)
    (tmp_path / "include/cuda.h").unlink()
    with pytest.raises(BackendUnavailableError, match=r"cuda\.h not found \(CUDA_HOME is not set\)"):
        check_export("aot", CUDA)


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
