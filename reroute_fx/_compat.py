"""Differences between versions and machines, in one place."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch.export import ExportedProgram
from transformers import PreTrainedModel


def package_version(name: str) -> str | None:
    """Version of an installed package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def settle_cpu_math() -> None:
    """Call the vectorised CPU functions once from one thread.

    In torch builds with MKL the first call of cos from several threads at once now and then returns
    values that are off by 1e-4 (seen in about one process in ten, torch 2.13): enough to change rotary
    positions and with them a selection. A first call on a tensor too small to be split avoids it.
    """
    small = torch.ones(8)
    for function in (torch.cos, torch.sin, torch.exp, torch.log, torch.tanh, torch.erf):
        function(small)


@contextmanager
def compilation_settings() -> Iterator[None]:
    """Settings under which regions run, and so are compiled.

    Sizes that happen to be equal are not taken to be one and the same. A region may be compiled for as many
    sizes as are asked for: with fixed sizes torch would stop with an error at the ninth.
    """
    shapes: Any = importlib.import_module("torch.fx.experimental._config")
    dynamo: Any = importlib.import_module("torch._dynamo.config")
    with (
        shapes.patch(use_duck_shape=False),
        dynamo.patch(recompile_limit=2**31, accumulated_recompile_limit=2**31),
    ):
        yield


def dynamo_export(
    model: PreTrainedModel, inputs: dict[str, Any], dynamic_shapes: dict[str, Any]
) -> ExportedProgram:
    """Export a Hugging Face module. Newer transformers return the program with metadata, 5.17 the program."""
    # Early versions of it import the code of many models, which those who load an artifact don't need.
    exporters: Any = importlib.import_module("transformers.exporters.exporter_dynamo")
    # Without the last option torch 2.11 finds constraints between sizes that it can't solve.
    config = exporters.DynamoConfig(
        dynamic=True, dynamic_shapes=dynamic_shapes, prefer_deferred_runtime_asserts_over_guards=True
    )
    exporter = exporters.DynamoExporter()
    program: ExportedProgram
    with torch.no_grad():
        if hasattr(exporter, "export_program"):
            program, _ = exporter.export_program(model, inputs, config)
        else:
            program = exporter.export(model, inputs, config)
    return program
