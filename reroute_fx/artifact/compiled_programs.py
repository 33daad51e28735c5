"""Programs of an artifact as AOTInductor packages over one file of weights."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.export import ExportedProgram

from ..errors import ArtifactError
from ..lowering import CallSchedule, ScheduledProgram
from ..lowering.inductor.aot_regions import Scheduled, load_region, package_region, schedule
from ..lowering.weights import WEIGHTS, memory_of, save_weights
from ..runtime import RoutedModel
from ..runtime.loaded_model import PROGRAMS
from .atomic_folder import check_free_space
from .files import check_package
from .manifest import ProgramFiles


def write_aot(
    programs: Mapping[str, ExportedProgram], model: RoutedModel, folder: Path, phase: Callable[..., None]
) -> tuple[dict[str, ProgramFiles], dict[str, torch.Tensor]]:
    """Compile programs, and write the weights that they share under the names that `model` gives them.

    Returns:
        The files of each program, and the weights.
    """
    scheduled = {name: schedule(program) for name, program in programs.items()}
    weights = _Weights(model, programs, scheduled)
    check_free_space(folder, sum(tensor.nbytes for tensor in weights.tensors.values()))
    steps = sum(len(parts.regions) for parts in scheduled.values())
    written = {}
    (folder / "programs").mkdir()
    for name, parts in scheduled.items():
        files = []
        for i, region in enumerate(parts.regions):
            phase(f"compiling {name}", steps)
            files.append(f"programs/{name}_{i}.pt2")
            (folder / files[-1]).write_bytes(package_region(region, model.device))
        plan = replace(parts.schedule, weights=weights.names[name])
        written[name] = ProgramFiles("aot", tuple(files), f"programs/{name}.json")
        (folder / f"programs/{name}.json").write_text(json.dumps(plan.to_json()))
    phase("writing weights")
    save_weights(weights.tensors, folder / WEIGHTS)
    return written, weights.tensors


def load_aot(
    folder: Path, name: str, files: ProgramFiles, weights: Mapping[str, torch.Tensor], device: torch.device
) -> ScheduledProgram:
    """A program on the weights of its artifact.

    Raises:
        ArtifactError: a package holds something else, or the schedule makes no sense.
    """
    for region in files.files:
        check_package(folder / region)
    try:
        plan = json.loads((folder / str(files.schedule)).read_text())
        compiled = [load_region(folder / region, device) for region in files.files]
        return ScheduledProgram(
            CallSchedule.from_json(plan, len(compiled), PROGRAMS[name]), compiled, weights
        )
    except KeyError as error:
        raise ArtifactError(
            f"{folder} lacks the weight {error} of {name}. Export the model again."
        ) from error
    except (OSError, RuntimeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"The program {name} of {folder} can't be loaded: {error}") from error


def read_weights(path: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """All weights of an artifact, by name."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ArtifactError(f"{path} is damaged: {error}. Copy the whole folder again.") from error


class _Weights:
    """The weights of all programs, each once.

    Attributes:
        tensors: by the names that the model gives them.
        names: for each program the names of its weights, in the order in which its schedule takes them.
    """

    def __init__(
        self,
        model: RoutedModel,
        programs: Mapping[str, ExportedProgram],
        scheduled: Mapping[str, Scheduled],
    ) -> None:
        known: dict[Any, str] = {}
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            known.setdefault(memory_of(tensor), name)
        self.tensors: dict[str, torch.Tensor] = {}
        self.names: dict[str, tuple[str, ...]] = {}
        for program, source in programs.items():
            held = {**source.state_dict, **source.constants}
            names = []
            for target in scheduled[program].schedule.weights:
                tensor = held[target]
                names.append(known.setdefault(memory_of(tensor), f"constants.{program}.{target}"))
                self.tensors[names[-1]] = tensor
            self.names[program] = tuple(names)
