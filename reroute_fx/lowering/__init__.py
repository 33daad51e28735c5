"""Lowering: an exported program in, something that runs fast out. Knows backends only."""

from .call_schedule import HIDDEN, CallSchedule, ScheduledProgram, as_executable
from .cuda_graphs import CudaRecorder
from .device import check_device, describe_operators
from .executable import BACKENDS, Executable, check_backend, lower
from .inductor.vector_units import ask_early
from .tensorrt.engines import TensorRTProgram, check_tensorrt

__all__ = [
    "BACKENDS",
    "HIDDEN",
    "CallSchedule",
    "CudaRecorder",
    "Executable",
    "ScheduledProgram",
    "TensorRTProgram",
    "as_executable",
    "ask_early",
    "check_backend",
    "check_device",
    "check_tensorrt",
    "describe_operators",
    "lower",
]
