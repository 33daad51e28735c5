"""Record what a program launches once for each kind of inputs, and replay it.

A prefill of a 7B decoder is some thousand launches; replayed as one CUDA graph it needs no work on the host
between them.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from ..common.pauses import between_regions
from ..common.turns import one_at_a_time

GRAPHS = 32
"""Graphs that are kept for a program; the one that was used longest ago makes room."""
_WARM_UP = 2
"""Calls of one kind that run as they are: the first compiles, the second finds everything compiled."""
_KINDS = 1000
"""Kinds whose calls are counted before they are recorded."""

Function = Callable[..., Sequence[torch.Tensor]]
Role = Literal["parameter", "cache", "input"]


class Recorder(Protocol):
    def record(
        self, run: Callable[[], Sequence[torch.Tensor]], device: torch.device
    ) -> tuple[Callable[[], None], Sequence[torch.Tensor]]:
        """Record `run` on a device; returns what replays it, and the results, which each replay writes again."""

    def turn(self, device: torch.device) -> AbstractContextManager[None]:
        """Around each call: what it launches on the device waits for what the call before it launched."""


class CudaRecorder:
    """Records on GPUs. All graphs of a device share one memory pool, for they never run at the same time."""

    def __init__(self) -> None:
        self._pools: dict[torch.device, Any] = {}
        self._streams: dict[torch.device, Any] = {}
        self._done: dict[torch.device, Any] = {}

    @contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        """Threads may have streams of their own, which don't wait for each other, and another current device."""
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device)
            if device in self._done:
                stream.wait_event(self._done[device])
            yield
            self._done[device] = stream.record_event()

    def record(
        self, run: Callable[[], Sequence[torch.Tensor]], device: torch.device
    ) -> tuple[Callable[[], None], Sequence[torch.Tensor]]:
        if device not in self._streams:
            # Left to itself torch records for every device on a stream of the one that came first.
            self._streams[device] = torch.cuda.Stream(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph,
            pool=self._pools.get(device),
            stream=self._streams[device],
            # Otherwise memory that another thread allocates meanwhile ends the recording with an error.
            capture_error_mode="thread_local",
        ):
            results = run()
        self._pools.setdefault(device, graph.pool())
        return graph.replay, results


@dataclass(frozen=True)
class _Recording:
    replay: Callable[[], None]
    inputs: Sequence[torch.Tensor | None]
    results: Sequence[torch.Tensor]


class CudaGraphs:
    """A function of tensors that replays a graph for inputs of a kind it has seen before.

    Args:
        function: runs without waiting for the device, with shapes that follow from those of its inputs.
        roles: of each input. A ``"parameter"`` is the same tensor in all calls; when its memory is another (``.data``
            was assigned) calls are recorded anew. A ``"cache"`` is read and written in place: a graph is bound to its
            address and doesn't keep it alive. An ``"input"`` is copied in. Results are copied out, so that they outlive
            the next call.
        recorder: records a call.
    """

    def __init__(self, function: Function, roles: Sequence[Role], recorder: Recorder) -> None:
        self._function = function
        self._roles = tuple(roles)
        self._recorder = recorder
        self._calls: Counter[Any] = Counter()
        self._recordings: OrderedDict[Any, _Recording] = OrderedDict()

    @property
    def recorded(self) -> int:
        """Graphs that are kept at present."""
        return len(self._recordings)

    @one_at_a_time
    def __call__(self, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        # A graph is one launch, and what else ran while it is recorded would be recorded with it.
        with self._recorder.turn(inputs[0].device), between_regions(None):
            return self._run(inputs)

    def _run(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        kind = self._kind(inputs)
        recording = self._recordings.get(kind)
        if recording is None:
            if len(self._calls) > _KINDS:
                self._calls.clear()  # caches come and go
            self._calls[kind] += 1
            if self._calls[kind] <= _WARM_UP:
                return self._function(*inputs)
            recording = self._record(kind, inputs)
        self._recordings.move_to_end(kind)
        for own, given in zip(recording.inputs, inputs, strict=True):
            if own is not None:
                own.copy_(given)
        recording.replay()
        return [result.clone() for result in recording.results]

    def _kind(self, inputs: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """What a graph is bound to."""
        return tuple(
            _address(x)
            if role == "parameter"
            else (x.data_ptr() if role == "cache" else None, x.shape, x.dtype)
            for x, role in zip(inputs, self._roles, strict=True)
        )

    def _record(self, kind: tuple[Any, ...], inputs: Sequence[torch.Tensor]) -> _Recording:
        copies = [x.clone() if role == "input" else None for x, role in zip(inputs, self._roles, strict=True)]
        read = [x if copy is None else copy for x, copy in zip(inputs, copies, strict=True)]
        replay, results = self._recorder.record(lambda: self._function(*read), inputs[0].device)
        recording = self._recordings[kind] = _Recording(replay, copies, results)
        del self._calls[kind]
        if len(self._recordings) > GRAPHS:
            self._recordings.popitem(last=False)
        return recording


def _address(parameter: torch.Tensor) -> int:
    """Where a parameter lies; packed ones have several places, and are taken to stay there."""
    is_plain = type(parameter) in (torch.Tensor, torch.nn.Parameter)
    return parameter.data_ptr() if is_plain else id(parameter)
