"""Read an artifact back: verify all of it, then put a model together from its programs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoProcessor, GenerationConfig

from .._compat import settle_cpu_math
from ..errors import ArtifactError
from ..lowering import Schedule, ScheduledProgram
from ..lowering.ahead import load_region
from ..runtime.loaded import PROGRAMS, LoadedModel, Parts
from .files import check_files, check_package
from .manifest import PROCESSOR, Manifest
from .report import ArtifactReport
from .requirements import check_memory


def load(path: str | Path, *, device: str | torch.device | None = None) -> LoadedModel:
    """A routed model from an artifact, without its model class and without tracing.

    Everything is verified before anything is used. The programs are machine code: load artifacts from sources you
    trust, as you would install a package.

    Args:
        path: folder that `reroute_fx.export` wrote, in the format ``"aot"``.
        device: where to load it, such as ``"cuda:1"``; None for the device of the kind it was exported for.

    Raises:
        ArtifactError: a file is missing, damaged, swapped or not of this artifact, or this machine can't run it.
    """
    folder = Path(path).resolve()
    manifest = Manifest.read(folder)
    if manifest.format != "aot":
        raise ArtifactError(
            f"{folder} is an artifact for {manifest.format}; reroute_fx.load reads format='aot'. Run it with the "
            f"runtime that it was exported for."
        )
    place = torch.device(device or manifest.requirements.device)
    manifest.requirements.check(place)
    check_memory(manifest.weight_bytes, place)
    check_files(folder, manifest.files)
    settle_cpu_math()
    weights = _read_weights(folder / manifest.weights, place)
    programs = {name: _load_program(folder, manifest, name, weights, place) for name in PROGRAMS}
    parts = Parts(
        config=_read_description(AutoConfig, folder, trust_remote_code=False),
        generation_config=_read_description(GenerationConfig, folder),
        routing_config=manifest.routing,
        limits=manifest.limits,
        dtype=getattr(torch, manifest.dtype),
        device=place,
        images=manifest.images,
        positions=manifest.positions,
        visual_ids=manifest.visual_ids,
        programs=programs,
    )
    return LoadedModel(parts, ArtifactReport.of(folder, manifest), _read_processor(folder, manifest))


def _read_weights(path: Path, device: torch.device) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ArtifactError(f"{path} is damaged: {error}. Copy the whole folder again.") from error


def _load_program(
    folder: Path, manifest: Manifest, name: str, weights: Mapping[str, torch.Tensor], device: torch.device
) -> ScheduledProgram:
    files = manifest.programs.get(name)
    if files is None or files.schedule is None:
        raise ArtifactError(f"{folder} has no program {name!r}. Export the model again.")
    for region in files.regions:
        check_package(folder / region)
    try:
        schedule = Schedule.from_json(json.loads((folder / files.schedule).read_text()), len(files.regions))
        regions = [load_region(folder / region, device) for region in files.regions]
        return ScheduledProgram(schedule, regions, weights)
    except KeyError as error:
        raise ArtifactError(
            f"{folder} lacks the weight {error} of {name}. Export the model again."
        ) from error
    except (RuntimeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"The program {name} of {folder} can't be loaded: {error}") from error


def _read_description(kind: Any, folder: Path, **options: Any) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{kind.__name__} can't read {folder}: {str(error).strip().splitlines()[0]} Use the transformers that it "
            f"was exported with."
        ) from error


def _read_processor(folder: Path, manifest: Manifest) -> Any:
    if not any(name.startswith(f"{PROCESSOR}/") for name in manifest.files):
        return None
    return _read_description(AutoProcessor, folder / PROCESSOR, trust_remote_code=False)
