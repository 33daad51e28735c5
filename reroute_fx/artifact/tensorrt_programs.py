"""Routed programs of an artifact as TensorRT engines."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.limits import Limits
from ..lowering.tensorrt.engines import TensorRTProgram, load_tensorrt, lower_tensorrt, save_tensorrt
from ..runtime.loaded_model import Program
from .manifest import ProgramFiles


def write_tensorrt(programs: Mapping[str, Any], folder: Path, limits: Limits) -> dict[str, ProgramFiles]:
    """Write lowered programs; those of another backend are built into engines first."""
    (folder / "programs").mkdir(exist_ok=True)
    written = {}
    for name, lowered in programs.items():
        is_built = isinstance(lowered, TensorRTProgram)
        engine = lowered if is_built else lower_tensorrt(lowered.program, name, limits)
        file = f"programs/{name}.pt2"
        save_tensorrt(engine, folder / file)
        written[name] = ProgramFiles("tensorrt", (file,))
    return written


def load_tensorrt_program(folder: Path, files: ProgramFiles) -> Program:
    """A program on TensorRT."""
    (file,) = files.files
    return load_tensorrt(folder / file).run
