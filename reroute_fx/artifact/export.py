"""Write a routed model to disk as programs that run without its class."""

import errno
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.export import ExportedProgram

from ..capture import find_visual_token_ids, text_decoder
from ..capture.positions import find_positions
from ..capture.vision_tower import capture_vision_tower
from ..capture.vocabulary import capture_embeddings, capture_head
from ..errors import ConfigError
from ..limits import Limits
from ..lowering.ahead import Scheduled, check_compiler, package_region, schedule
from ..runtime import LoadedModel, RoutedModel
from .files import list_files
from .folders import check_free_space, whole_folder
from .inputs import input_contract
from .manifest import FORMATS, PROCESSOR, SCHEMA, Manifest, ProgramFiles
from .requirements import Requirements

WEIGHTS = "weights.safetensors"
_PACKAGES = ("reroute-fx", "torch", "transformers", "triton", "safetensors")


def export(
    routed: Any,
    path: str | Path,
    *,
    format: str = "aot",
    limits: Limits | None = None,
    processor: Any = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Write a routed model as an artifact, which `reroute_fx.load` runs without the model's class.

    Args:
        routed: what `reroute_fx.compile` returned, on the kind of device that the artifact is for.
        path: folder to make. It appears whole or not at all.
        format: ``"aot"``.
        limits: the largest call that the artifact has to serve.
        processor: of the model, to be kept with it.
        overwrite: replace an artifact at `path`, once the new one is complete.
        progress: show on the terminal what is going on.

    Returns:
        The path of the artifact.

    Raises:
        ConfigError: an argument is no routed model, an unknown format or an invalid limit; before anything runs.
        ArtifactError: `path` exists, can't be written, or the disk is full.
        BackendUnavailableError: no C++ compiler.
        UnsupportedModelError, CaptureError: the model has parts that can't be exported.
    """
    target = Path(path)
    _check_arguments(routed, format, limits, processor)
    check_compiler()
    with whole_folder(target, overwrite) as folder, _phases(progress) as phase:
        _write(routed, folder, limits or default_limits(routed), processor, phase)
        phase("writing to disk")
    return target


def default_limits(routed: RoutedModel) -> Limits:
    """As long as the model was made for, within the defaults."""
    longest = getattr(routed.config.get_text_config(decoder=True), "max_position_embeddings", Limits.length)
    length = min(Limits.length, longest)
    return Limits(length=length, image_tokens=min(Limits.image_tokens, length))


def _check_arguments(routed: Any, format: str, limits: Any, processor: Any) -> None:
    if not isinstance(routed, RoutedModel) or isinstance(routed, LoadedModel):
        raise ConfigError(
            f"routed is a {type(routed).__name__}; expected what reroute_fx.compile returned. Compile the model first."
        )
    if format not in FORMATS:
        raise ConfigError(f"format is {format!r}; expected one of {list(FORMATS)}.")
    if limits is not None and not isinstance(limits, Limits):
        raise ConfigError(f"limits is a {type(limits).__name__}; expected reroute_fx.Limits.")
    if processor is not None and not hasattr(processor, "save_pretrained"):
        raise ConfigError(
            f"processor is a {type(processor).__name__}; expected the processor of the model, from AutoProcessor."
        )


@dataclass(frozen=True)
class _Traced:
    """The programs of a model before they are compiled."""

    programs: Mapping[str, ExportedProgram]
    scheduled: Mapping[str, Scheduled]
    images: Any
    positions: Any


def _write(
    routed: RoutedModel, folder: Path, limits: Limits, processor: Any, phase: Callable[..., None]
) -> None:
    phase("tracing")
    traced = _trace(routed)
    weights = _Weights(routed, traced)
    check_free_space(folder, sum(tensor.nbytes for tensor in weights.tensors.values()))
    regions = sum(len(parts.regions) for parts in traced.scheduled.values())
    programs = {}
    for name, parts in traced.scheduled.items():
        files = []
        for i, region in enumerate(parts.regions):
            phase(f"compiling {name}", steps=regions)
            files.append(f"programs/{name}_{i}.pt2")
            _file(folder, files[-1]).write_bytes(package_region(region, routed.device))
        plan = replace(parts.schedule, weights=weights.names[name])
        programs[name] = ProgramFiles(tuple(files), f"programs/{name}.json")
        _file(folder, f"programs/{name}.json").write_text(json.dumps(plan.to_json()))
    phase("writing weights")
    weights.save(folder / WEIGHTS)
    _write_descriptions(routed, folder, processor)
    dtype = str(routed.dtype).removeprefix("torch.")
    manifest = Manifest(
        schema=SCHEMA,
        format="aot",
        model=type(routed).__name__.removeprefix("Routed"),
        model_type=routed.config.model_type,
        dtype=dtype,
        routing=routed.routing_config,
        limits=limits,
        inputs=input_contract(traced.images, dtype),
        images=traced.images,
        positions=traced.positions,
        visual_ids=find_visual_token_ids(routed.config),
        requirements=Requirements.of(routed.device),
        versions=_versions(),
        programs=programs,
        weights=WEIGHTS,
        files=list_files(folder),
    )
    manifest.write(folder)


def _trace(routed: RoutedModel) -> _Traced:
    tower = capture_vision_tower(routed)
    programs = {
        "embeddings": capture_embeddings(routed),
        "images": tower.program,
        **{name: executable.program for name, executable in routed.programs.items()},
        "head": capture_head(routed),
    }
    scheduled = {name: schedule(program) for name, program in programs.items()}
    return _Traced(
        programs, scheduled, tower.images, find_positions(routed, text_decoder(routed).position_rank)
    )


class _Weights:
    """The weights of all programs, each once.

    Attributes:
        tensors: by the names that the model gives them.
        names: for each program the names of its weights, in the order in which its schedule takes them.
    """

    def __init__(self, routed: RoutedModel, traced: _Traced) -> None:
        known: dict[Any, str] = {}
        for name, tensor in chain(routed.named_parameters(), routed.named_buffers()):
            known.setdefault(_place(tensor), name)
        self.tensors: dict[str, torch.Tensor] = {}
        self.names: dict[str, tuple[str, ...]] = {}
        for program, source in traced.programs.items():
            held = {**source.state_dict, **source.constants}
            names = []
            for target in traced.scheduled[program].schedule.weights:
                tensor = held[target]
                names.append(known.setdefault(_place(tensor), f"constants.{program}.{target}"))
                self.tensors[names[-1]] = tensor
            self.names[program] = tuple(names)

    def save(self, path: Path) -> None:
        plain = {name: _alone(tensor.detach()) for name, tensor in self.tensors.items()}
        try:
            save_file(plain, path)
        except SafetensorError as error:
            # The library tells of a full disk in words.
            raise OSError(errno.ENOSPC if "No space" in str(error) else errno.EIO, str(error)) from error


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same memory."""
    storage = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return (*storage, tensor.dtype, tensor.shape, tensor.stride())


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in memory of its own, without gaps."""
    is_alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if is_alone else tensor.clone(memory_format=torch.contiguous_format)


def _write_descriptions(routed: Any, folder: Path, processor: Any) -> None:
    """What transformers reads: configs and the processor."""
    routed.config.save_pretrained(folder)
    routed.generation_config.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder / PROCESSOR)


def _file(folder: Path, name: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@contextmanager
def _phases(show: bool) -> Iterator[Callable[..., None]]:
    """A function to call at the start of each phase, or of each of its `steps`."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not show) as bar:
        task = bar.add_task("", total=None)

        def phase(description: str, steps: int | None = None) -> None:
            task_steps = bar.tasks[task].total
            if steps is None:
                bar.reset(task, total=None, description=description)
            elif task_steps != steps:
                bar.reset(task, total=steps, description=description)
            else:
                bar.update(task, advance=1, description=description)

        yield phase
