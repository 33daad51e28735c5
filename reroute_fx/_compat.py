"""Differences between versions and machines, in one place."""

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import torch
from torch.export import ExportedProgram
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from .errors import BackendUnavailableError

_HOOKS = {
    "_prepare_cache_for_generation": ("generation_config", "model_kwargs", "generation_mode"),
    "_prepare_position_ids_for_generation": ("inputs_tensor", "model_kwargs"),
    "_expand_inputs_for_generation": ("expand_size", "is_encoder_decoder", "input_ids", "model_kwargs"),
    "_maybe_prepare_encoder_kwargs_for_generation": ("inputs_tensor", "model_kwargs"),
    "_validate_model_kwargs": ("model_kwargs",),
}
"""Methods that `generate` calls and routed models extend, and the arguments that they read."""
_REFUSED: dict[str, tuple[str, ...]] = {
    "generate_batch": ("inputs",),
    "init_continuous_batching": (),
    "continuous_batching_context_manager": (),
}
"""Other ways to generate, which routed models refuse under these names."""
_CACHE = {
    "get_seq_length": ("layer_idx",),
    "get_mask_sizes": ("query_length", "layer_idx"),
    "update": ("key_states", "value_states", "layer_idx"),
    "crop": ("tokens_to_remove",),
    "reset": (),
    "reorder_cache": ("beam_idx",),
    "batch_repeat_interleave": ("repeats",),
    "batch_select_indices": ("indices",),
}
"""Methods of a cache that a `RoutedCache` extends."""
_CACHE_FIELDS = ("layers", "layer_class_to_replicate", "offloading")
_LAYER_FIELDS = ("keys", "values", "is_initialized")


def package_version(name: str) -> str | None:
    """Version of an installed package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_transformers() -> None:
    """Raise unless transformers has what routed models extend, under the names and with the arguments that they know.

    A hook that got another name would never be called: what routed models refuse would run, and be wrong.

    Raises:
        BackendUnavailableError: a method, an argument or an attribute is missing.
    """
    for kind, methods in ((GenerationMixin, _HOOKS | _REFUSED), (DynamicCache, _CACHE)):
        for name, arguments in methods.items():
            _check_method(kind, name, arguments)
    # Without it rows of a beam search get each other's pictures.
    _check_method(GenerationMixin, "_expand_multimodal_outputs", ("input_ids", "mm_encoder_output"))
    _check_method(DynamicLayer, "lazy_initialization", ("key_states", "value_states"))
    called = inspect.unwrap(GenerationMixin.generate).__code__.co_names
    for name in (name for name in _HOOKS if name not in called):
        raise _other_transformers(f"GenerationMixin.generate does not call {name}")
    for made, fields in ((DynamicCache(), _CACHE_FIELDS), (DynamicLayer(), _LAYER_FIELDS)):
        for name in (name for name in fields if not hasattr(made, name)):
            raise _other_transformers(f"{type(made).__name__} has no attribute {name}")


def _check_method(kind: type, name: str, arguments: tuple[str, ...]) -> None:
    method = getattr(kind, name, None)
    if method is None:
        raise _other_transformers(f"{kind.__name__} has no method {name}")
    # Some are static in one release and not in the next.
    found = tuple(argument for argument in inspect.signature(method).parameters if argument != "self")
    if found[: len(arguments)] != arguments:
        raise _other_transformers(
            f"{kind.__name__}.{name} takes {', '.join(found)}; expected {', '.join(arguments)} first"
        )


def _other_transformers(what: str) -> BackendUnavailableError:
    supported = next((line for line in requires("reroute-fx") or () if line.startswith("transformers")), "")
    return BackendUnavailableError(
        f"transformers is {version('transformers')}, in which {what}; routed models need what they know. Install "
        f"{supported or 'another release'}."
    )


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
def unequal_sizes() -> Iterator[None]:
    """While a program is traced, sizes that happen to be equal are not taken to be one and the same."""
    shapes: Any = importlib.import_module("torch.fx.experimental._config")
    with shapes.patch(use_duck_shape=False):
        yield


def dynamo_export(
    model: PreTrainedModel, inputs: dict[str, Any], dynamic_shapes: dict[str, Any]
) -> ExportedProgram:
    """Export a Hugging Face module. transformers 5.23 returns the program with metadata, 5.22 the program.

    Raises:
        BackendUnavailableError: transformers has another exporter.
    """
    try:
        # Early versions of it import the code of many models, which those who load an artifact don't need.
        exporters: Any = importlib.import_module("transformers.exporters.exporter_dynamo")
        # Without the last option torch 2.11 finds constraints between sizes that it can't solve.
        config = exporters.DynamoConfig(
            dynamic=True, dynamic_shapes=dynamic_shapes, prefer_deferred_runtime_asserts_over_guards=True
        )
        exporter = exporters.DynamoExporter()
    except (ImportError, AttributeError, TypeError) as error:
        raise _other_transformers(f"the exporter is another one ({error})") from error
    program: ExportedProgram
    with torch.no_grad(), _patches_of_loaded_models():
        if hasattr(exporter, "export_program"):
            program, _ = exporter.export_program(model, inputs, config)
        else:
            program = exporter.export(model, inputs, config)
    return program


@contextmanager
def _patches_of_loaded_models() -> Iterator[None]:
    """Leave out patches of models whose code nobody imported, which can't run: to find them, it is imported."""
    # Early versions of transformers keep them elsewhere, and import what they patch.
    exporting = sys.modules.get("transformers.exporters.utils")
    patches: dict[str, list[Any]] = getattr(exporting, "_PATCHES", {})
    before = patches.get("dynamo")
    if before is None:
        yield
        return
    patches["dynamo"] = [patch for patch in before if _is_loaded(patch[0])]
    try:
        yield
    finally:
        patches["dynamo"] = before


def _is_loaded(place: Any) -> bool:
    """Whether there is something to patch at ``transformers.models.<name>.<module>...``; true of other places."""
    parts = place.split(".") if isinstance(place, str) else []
    return parts[:2] != ["transformers", "models"] or ".".join(parts[:4]) in sys.modules
