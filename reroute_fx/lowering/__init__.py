"""Lowering: an exported program in, something that runs fast out. Knows backends only."""

from .cuda_graphs import CudaRecorder
from .device import check_device, describe_operators
from .executable import BACKENDS, Executable, check_backend, lower
from .schedule import DecoderProgram, Schedule, ScheduledProgram

__all__ = [
    "BACKENDS",
    "CudaRecorder",
    "DecoderProgram",
    "Executable",
    "Schedule",
    "ScheduledProgram",
    "check_backend",
    "check_device",
    "describe_operators",
    "lower",
]
