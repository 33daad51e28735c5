"""Read an artifact back: verify all of it, then put a model together from its programs."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor, GenerationConfig

from .._compat import settle_cpu_math
from ..errors import ArtifactError, ConfigError, first_line
from ..lowering.weights import WEIGHTS
from ..runtime.loaded_model import PROGRAMS, LoadedModel, Parts, Program
from .artifact_report import ArtifactReport
from .compiled_programs import load_aot, read_weights
from .files import check_files
from .manifest import PROCESSOR, Manifest, ProgramFiles
from .onnx_programs import load_onnx_program
from .requirements import check_memory
from .tensorrt_programs import load_tensorrt_program


def load(path: str | Path, *, device: str | torch.device | None = None) -> LoadedModel:
    """A routed model from an artifact, without its model class and without tracing.

    Everything is verified before anything is used. The programs are machine code: load artifacts from sources you
    trust, as you would install a package.

    Args:
        path: folder that `reroute_fx.export` wrote.
        device: where to load it, such as ``"cuda:1"``; None for the device of the kind it was exported for.

    Raises:
        ConfigError: `device` is no name of a device.
        ArtifactError: a file is missing, damaged, swapped or not of this artifact, or this machine can't run it.
    """
    folder = Path(path).resolve()
    manifest = Manifest.read(folder)
    needs = manifest.requirements
    place = _place(device or (needs.device if needs else "cpu"))
    if needs:
        needs.check(place)
    elif place.type != "cpu":
        raise ArtifactError(f"device is {place}, but ONNX artifacts run on cpu here; leave device out.")
    place = torch.empty(0, device=place).device  # with the number of the GPU
    check_memory(manifest.weight_bytes, place)
    check_files(folder, manifest.files)
    settle_cpu_math()
    return read_model(folder, manifest, place)


def _place(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device is {device!r}; expected cpu, cuda or cuda:1.") from error


def read_model(
    folder: Path,
    manifest: Manifest,
    device: torch.device,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> LoadedModel:
    """The model of an artifact that was verified.

    Args:
        folder: of the artifact.
        manifest: its manifest.
        device: where the weights go, and the programs run.
        weights: by name, if they are at hand.
    """
    programs = _load_programs(folder, manifest, device, weights)
    parts = Parts(
        config=_read_description(AutoConfig, folder, trust_remote_code=False),
        generation_config=_read_description(GenerationConfig, folder),
        routing_config=manifest.routing,
        limits=manifest.limits,
        dtype=getattr(torch, manifest.dtype),
        device=device,
        images=manifest.images,
        positions=manifest.positions,
        layer_features=manifest.layer_features,
        groups=manifest.groups,
        visual_ids=manifest.visual_ids,
        programs=programs,
        asked=manifest.asked,
        stateful=manifest.stateful,
    )
    return LoadedModel(parts, ArtifactReport(folder, manifest), _read_processor(folder, manifest))


def _load_programs(
    folder: Path, manifest: Manifest, device: torch.device, given: Mapping[str, torch.Tensor] | None
) -> dict[str, Program]:
    missing = [name for name in PROGRAMS if name not in manifest.programs]
    if missing:
        raise ArtifactError(f"{folder} has no program {missing[0]!r}. Export the model again.")
    found = {name: manifest.programs[name] for name in PROGRAMS}
    weights = given or {}
    if given is None and any(files.format == "aot" for files in found.values()):
        weights = read_weights(folder / WEIGHTS, device)
    loaders: dict[str, Callable[[str, ProgramFiles], Program]] = {
        "aot": lambda name, files: load_aot(folder, name, files, weights, device),
        "onnx": lambda name, files: load_onnx_program(folder, files),
        "tensorrt": lambda name, files: load_tensorrt_program(folder, files),
    }
    return {name: loaders[files.format](name, files) for name, files in found.items()}


def _read_description(kind: Any, folder: Path, **options: Any) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # Tokenizers raise no other class.
        raise ArtifactError(
            f"{kind.__name__} can't read {folder}: {first_line(error)}. Use the transformers that it "
            f"was exported with."
        ) from error


def _read_processor(folder: Path, manifest: Manifest) -> Any:
    if not any(name.startswith(f"{PROCESSOR}/") for name in manifest.files):
        return None
    return _read_description(AutoProcessor, folder / PROCESSOR, trust_remote_code=False)
