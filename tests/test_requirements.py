"""Compiled code is only run where it can run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reroute_fx import ArtifactError
from reroute_fx.artifact import requirements
from reroute_fx.artifact.requirements import Requirements, check_memory

CPU = torch.device("cpu")
GPU = replace(Requirements.of(CPU), device="cuda", instructions=(), capability=(9, 0), cuda_release="12.8")


def test_what_was_compiled_here_runs_here():
    here = Requirements.of(CPU)
    assert here.torch_release == torch.__version__.split("+")[0]
    if Path("/proc/cpuinfo").exists():
        assert here.instructions
    here.check(CPU)
    replace(here, instructions=here.instructions[1:]).check(CPU)  # a processor with more than is needed


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"torch_release": "2.99.0"}, r"torch 2\.99\.0, but here is .*pip install torch==2\.99\.0"),
        ({"machine": "riscv64"}, r"processor riscv64, but here is"),
        ({"instructions": ("avx1024", "avx2048")}, r"one with avx1024, avx2048, but here is one without"),
        ({"device": "cuda"}, r"device cuda, but here is cpu; load it with device='cuda'"),
    ],
)
def test_other_machines_are_told(change, match):
    with pytest.raises(ArtifactError, match=match):
        replace(Requirements.of(CPU), **change).check(CPU)


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU of some capability, as far as can be told without one."""

    def at(capability, release="12.8"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "cuda", release)

    return at


@pytest.mark.parametrize("capability", [(9, 0), (9, 3)])
def test_gpus_of_the_same_generation_pass(gpu, capability):
    gpu(capability)
    GPU.check(torch.device("cuda"))


@pytest.mark.parametrize("capability", [(8, 9), (10, 0)])
def test_other_gpus_are_told(gpu, capability):
    gpu(capability)
    found = ".".join(map(str, capability))
    with pytest.raises(ArtifactError, match=rf"compute capability 9\.0, but here is {found}"):
        GPU.check(torch.device("cuda"))


def test_earlier_gpus_of_the_generation_are_told(gpu):
    gpu((9, 0))
    with pytest.raises(ArtifactError, match=r"compute capability 9\.2, but here is 9\.0"):
        replace(GPU, capability=(9, 2)).check(torch.device("cuda"))


def test_another_cuda_is_told(gpu):
    gpu((9, 0), "13.0")
    with pytest.raises(ArtifactError, match=r"CUDA 12\.8, but here is 13\.0"):
        GPU.check(torch.device("cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_machines_without_a_gpu_are_told():
    with pytest.raises(ArtifactError, match="without a GPU"):
        GPU.check(torch.device("cuda"))


def test_memory_is_checked(monkeypatch):
    check_memory(1, CPU)
    monkeypatch.setattr(requirements, "_free_bytes", lambda device: 2**30)
    check_memory(2**30, CPU)
    with pytest.raises(ArtifactError, match=r"2\.0 GiB of weights, but cpu has 1\.0 GiB free"):
        check_memory(2**31, CPU)
    monkeypatch.setattr(requirements, "_free_bytes", lambda device: None)
    check_memory(2**60, CPU)
