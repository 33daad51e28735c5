"""Programs of an artifact as ONNX files over one file of weights."""

from collections.abc import Mapping
from pathlib import Path

from torch.export import ExportedProgram

from ..errors import ArtifactError, RerouteError
from ..lowering.onnx.onnx_program import OnnxProgram, write_onnx
from ..runtime.loaded_model import Program
from .manifest import ProgramFiles


def write_onnx_programs(programs: Mapping[str, ExportedProgram], folder: Path) -> dict[str, ProgramFiles]:
    """Convert programs and write the weights that they share."""
    paths = write_onnx(programs, folder)
    return {name: ProgramFiles("onnx", (path.name,)) for name, path in paths.items()}


def load_onnx_program(folder: Path, files: ProgramFiles) -> Program:
    """A program on ONNX Runtime.

    Raises:
        ArtifactError: it is no model that ONNX Runtime can run.
        BackendUnavailableError: ONNX Runtime is missing.
    """
    (name,) = files.files
    try:
        return OnnxProgram(folder / name).run
    except RerouteError:
        raise
    except Exception as error:  # Those of ONNX Runtime have no other class in common.
        raise ArtifactError(f"ONNX Runtime can't load {folder / name}: {error}") from error
