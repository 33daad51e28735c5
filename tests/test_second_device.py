"""With two GPUs all that is launched or recorded for tensors of the second happens on the second.

There is none here: tensors are fake, and a stand-in for `torch.cuda` knows which device is current.
"""

import importlib
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from reroute_fx import kernels
from reroute_fx.lowering import executable, lower
from reroute_fx.lowering.call_schedule import HIDDEN, CallSchedule, RegionCall, ScheduledProgram
from reroute_fx.lowering.cuda_graphs import CudaGraphs, CudaRecorder

DEVICES = [torch.device("cuda", index) for index in (0, 1)]


class Cuda:
    """Which device is current, and what was recorded."""

    def __init__(self):
        self.current, self.recorded, self.waits = DEVICES[0], [], []

    @contextmanager
    def device(self, device):
        before, self.current = self.current, device
        yield
        self.current = before

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.recorded.append((self.current, stream.device, pool))
        yield

    def stream_class(self):
        cuda = self

        class Stream:
            def __init__(self, device):
                self.device = device

            def wait_event(self, event):
                cuda.waits.append((self.device, event))

            def record_event(self):
                return self.device

        return Stream

    def graph_class(self):
        cuda = self

        class Graph:
            def __init__(self):
                self.device = cuda.current

            def pool(self):
                return f"memory of {self.device}"

            def replay(self):
                assert cuda.current == self.device

        return Graph


@pytest.fixture
def cuda(monkeypatch):
    stand_in = Cuda()
    stream = stand_in.stream_class()
    for name, value in {
        "device": stand_in.device,
        "graph": stand_in.graph,
        "Stream": stream,
        "current_stream": stream,
        "CUDAGraph": stand_in.graph_class(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return stand_in


def test_graphs_are_recorded_and_replayed_where_the_tensors_are(cuda):
    run_on = []

    def double(x):
        run_on.append((cuda.current, x.device))
        return [2 * x]

    recorder = CudaRecorder()
    graphs = [CudaGraphs(double, ["parameter"], recorder) for _ in range(2)]
    with FakeTensorMode():
        tensors = [torch.ones(3, device=device) for device in reversed(DEVICES)]
        for _ in range(4):
            for tensor in tensors:
                for run in graphs:
                    (result,) = run(tensor)
                    assert result.device == tensor.device
    assert all(current == device for current, device in run_on)
    first, second = DEVICES
    pools = [None, *(f"memory of {device}" for device in DEVICES)]
    assert cuda.recorded == [
        (second, second, pools[0]),
        (second, second, pools[2]),
        (first, first, pools[0]),
        (first, first, pools[1]),
    ]
    # A call waits for the one before on its own device only.
    assert all(device == event for device, event in cuda.waits)
    assert len(cuda.waits) == 2 * (4 * 2 - 1)
    assert cuda.current == first


GIVEN = {
    "select_tokens": ("scores", 7),
    "compact_tokens": ("positions", 3),
    "visual_scores": ("query", 5),
    "restore_tokens": ("stream", 3),
    "restore_tokens_": ("stream", 3),
}
"""Of each operator with a kernel: an argument that lies on the device, and how many there are."""


@pytest.mark.parametrize("name", GIVEN)
def test_kernels_are_launched_where_the_tensors_are(cuda, monkeypatch, name):
    module = importlib.import_module(f"reroute_fx.kernels.{name.removesuffix('_')}.triton")
    launched = []
    in_place = "_" if name.endswith("_") else ""
    monkeypatch.setattr(
        module, f"{name.removesuffix('_')}_triton{in_place}", lambda *given: launched.append(cuda.current)
    )
    with FakeTensorMode():
        tensor = torch.ones(2, device=DEVICES[1])
    _, count = GIVEN[name]
    getattr(kernels, name)._backend_fns["cuda"](*[tensor] * count)
    assert launched == [DEVICES[1]]


def test_programs_run_where_their_tensors_are(cuda, monkeypatch):
    """What is left uncompiled between regions launches kernels as well."""
    program = torch.export.export(torch.nn.ReLU(), (torch.ones(2),))
    monkeypatch.setattr(executable, "program_device", lambda _: DEVICES[1])
    run, run_on = lower(program, "eager"), []
    run._module = lambda x: run_on.append(cuda.current) or [x]
    run(input=torch.ones(2))
    assert run_on == [DEVICES[1]]


def test_loaded_programs_run_where_their_tensors_are(cuda):
    run_on = []
    schedule = CallSchedule(("x",), (), (RegionCall(0, (0,), (), 1),), {HIDDEN: 1})
    run = ScheduledProgram(schedule, [lambda given: run_on.append(cuda.current) or given], {})
    with FakeTensorMode():
        tensor = torch.ones(2, device=DEVICES[1])
    assert run(x=tensor)[HIDDEN] is tensor
    assert run_on == [DEVICES[1]]
