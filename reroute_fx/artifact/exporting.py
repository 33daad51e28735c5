"""Write a routed model to disk as programs that run without its class."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch.export import ExportedProgram

from .._compat import package_version
from ..capture import find_visual_token_ids, text_decoder
from ..capture.image_layout import AnyImages
from ..capture.positions import GridPositions, find_positions
from ..capture.prompt_groups import PromptGroups, find_groups
from ..capture.vision_tower import capture_vision_tower
from ..capture.vocabulary import capture_embeddings, capture_head
from ..config.limits import Limits
from ..errors import ConfigError, UnsupportedModelError
from ..loading.models_by_name import name_of
from ..lowering import check_tensorrt
from ..lowering.inductor.aot_regions import check_compiler
from ..lowering.onnx.onnx_program import check_libraries
from ..runtime import LoadedModel, RoutedModel
from ..selection.asked_inputs import asked_inputs
from .atomic_folder import whole_folder
from .checking import check_answers, check_pictures
from .compiled_programs import write_aot
from .files import list_files
from .input_contract import input_contract
from .loading import read_model
from .manifest import FORMATS, PROCESSOR, SCHEMA, Manifest
from .onnx_programs import write_onnx_programs
from .requirements import Requirements
from .tensorrt_programs import write_tensorrt

_PACKAGES = (
    "reroute-fx",
    "torch",
    "transformers",
    "triton",
    "safetensors",
    "onnx",
    "torch-tensorrt",
    "tensorrt",
)


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
        format: ``"aot"`` for machine code of this kind of machine, ``"onnx"`` for ONNX files, ``"tensorrt"`` for
            engines of the routed programs and machine code around them.
        limits: the largest call that the artifact has to serve.
        processor: of the model, to be kept with it.
        overwrite: replace an artifact at `path`, once the new one is complete.
        progress: show on the terminal what is going on.

    Returns:
        The path of the artifact.

    Raises:
        ConfigError: an argument is no routed model, an unknown format, an invalid limit, or ONNX of a bfloat16 model;
            before anything runs.
        ArtifactError: `path` exists, can't be written, or the disk is full.
        BackendUnavailableError: no C++ compiler, no CUDA toolkit for a model on a GPU, or no library for the format.
        UnsupportedModelError, CaptureError: the model has parts that can't be exported.
        InputError: its parameters or modules are no longer those that were compiled.
    """
    target = Path(path)
    _check_arguments(routed, limits, processor)
    routed.check_parts()
    check_export(format, routed.device)
    if format == "onnx" and routed.dtype == torch.bfloat16:
        raise ConfigError(
            "routed is a bfloat16 model, of which ONNX Runtime runs no convolution on CPU; expected float32 or float16 "
            "for format='onnx'. Load the model with dtype=torch.float32 (--dtype float32)."
        )
    with whole_folder(target, overwrite) as folder, _phases(progress) as phase:
        _write(routed, folder, format, limits or default_limits(routed), processor, phase)
        phase("writing to disk")
    return target


def check_export(format: str, device: str | torch.device) -> None:
    """Raise what `export` would about a format on this machine, before any model is loaded.

    Raises:
        ConfigError: there is no such format.
        BackendUnavailableError: no C++ compiler, no CUDA toolkit for a model on a GPU, or no library for the format.
    """
    if format not in FORMATS:
        raise ConfigError(f"format is {format!r}; expected one of {list(FORMATS)}.")
    if format == "onnx":
        check_libraries()
    else:
        check_compiler(torch.device(device))
    if format == "tensorrt":
        check_tensorrt(torch.device(device))


def default_limits(routed: RoutedModel) -> Limits:
    """As long as the model was made for, within the defaults."""
    longest = getattr(routed.config.get_text_config(decoder=True), "max_position_embeddings", Limits.length)
    length = min(Limits.length, longest)
    return Limits(length=length, image_tokens=min(Limits.image_tokens, length))


def _check_arguments(routed: Any, limits: Any, processor: Any) -> None:
    if not isinstance(routed, RoutedModel) or isinstance(routed, LoadedModel):
        raise ConfigError(
            f"routed is a {type(routed).__name__}; expected what reroute_fx.compile returned. Compile the model first."
        )
    if _scans(routed):
        raise UnsupportedModelError(
            f"Layers of {type(routed).__name__} scan their tokens one after another (linear attention by the gated "
            f"delta rule), by an operator that runs in this process only; expected attention or convolutions in all of "
            f"them. It can't be exported; use reroute_fx.compile."
        )
    if token_inputs := text_decoder(routed).token_inputs:
        raise UnsupportedModelError(
            f"The decoder of {type(routed).__name__} takes {token_inputs[0].name} for each token; expected one that "
            f"takes embeddings and positions only, which is what an artifact makes of a prompt. It can't be exported; "
            f"use reroute_fx.compile."
        )
    if limits is not None and not isinstance(limits, Limits):
        raise ConfigError(f"limits is a {type(limits).__name__}; expected reroute_fx.Limits.")
    if processor is not None and not hasattr(processor, "save_pretrained"):
        raise ConfigError(
            f"processor is a {type(processor).__name__}; expected the processor of the model, from AutoProcessor."
        )


def _scans(routed: RoutedModel) -> bool:
    graphs = [executable.program.graph for executable in routed.programs.values()]
    scan = torch.ops.reroute.gated_delta.default
    return any(graph.find_nodes(op="call_function", target=scan) for graph in graphs)


@dataclass(frozen=True)
class Traced:
    """The programs of a model before they are compiled, and how it takes its inputs."""

    programs: Mapping[str, ExportedProgram]
    images: AnyImages
    positions: GridPositions | None
    groups: PromptGroups | None


def trace(routed: RoutedModel) -> Traced:
    """All programs of a model, by the names in `PROGRAMS`."""
    tower, groups = routed.tower or capture_vision_tower(routed), find_groups(routed)
    programs = {
        "embeddings": capture_embeddings(routed),
        "images": tower.program,
        **{name: executable.program for name, executable in routed.programs.items()},
        "head": capture_head(routed, takes_types=groups is not None),
    }
    positions = find_positions(routed, text_decoder(routed).position_rank)
    return Traced(programs, tower.images, positions, groups)


def _write(
    routed: RoutedModel,
    folder: Path,
    format: str,
    limits: Limits,
    processor: Any,
    phase: Callable[..., None],
) -> None:
    phase("tracing")
    traced, weights = trace(routed), None
    if format == "onnx":
        phase("converting")
        programs = write_onnx_programs(traced.programs, folder)
    elif format == "tensorrt":
        around = {name: p for name, p in traced.programs.items() if name not in routed.programs}
        programs, weights = write_aot(around, routed, folder, phase)
        phase("building engines")
        programs |= write_tensorrt(routed.programs, folder, limits)
    else:
        programs, weights = write_aot(traced.programs, routed, folder, phase)
    _write_descriptions(routed, folder, processor)
    dtype = str(routed.dtype).removeprefix("torch.")
    manifest = Manifest(
        schema=SCHEMA,
        format=format,
        name=name_of(routed.config),
        model=type(routed).__name__.removeprefix("Routed"),
        model_type=routed.config.model_type,
        dtype=dtype,
        routing=routed.routing_config,
        limits=limits,
        inputs=input_contract(traced.images, dtype),
        images=traced.images,
        positions=traced.positions,
        layer_features=text_decoder(routed).layer_features,
        groups=traced.groups,
        visual_ids=find_visual_token_ids(routed.config),
        requirements=None if format == "onnx" else Requirements.of(routed.device),
        versions={name: found for name in _PACKAGES if (found := package_version(name))},
        programs=programs,
        files=list_files(folder),
        asked=asked_inputs(traced.programs["prefill"]),
        stateful=text_decoder(routed).stateful,
    )
    manifest.write(folder)
    phase("checking")
    loaded = read_model(folder, manifest, routed.device, weights)
    check_answers(routed, loaded)
    check_pictures(traced.programs["images"], loaded)


def _write_descriptions(routed: Any, folder: Path, processor: Any) -> None:
    """What transformers reads: configs and the processor."""
    routed.config.save_pretrained(folder)
    routed.generation_config.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder / PROCESSOR)


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
            bar.refresh()

        yield phase
