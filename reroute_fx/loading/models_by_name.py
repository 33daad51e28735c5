"""Models named on the command line, with their processors and their routing."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from ..capture.visual_tokens import has_grids
from ..config.choosing import choose_config
from ..config.routing_config import RoutingConfig
from ..errors import ConfigError, UnsupportedModelError, first_line

DEMO = "demo"
CHECKPOINT = Path(__file__).parents[1] / "grounding" / "model"
"""The small LLaVA that ships with the package, trained on generated scenes; its card is in the folder."""
AUTO = "auto"
DTYPES = (AUTO, "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class NamedModel:
    """A model in eval mode on its device, and its processor."""

    model: Any
    processor: Any


def choose_device(device: str, dtype: str) -> str:
    """The device that is meant, where a model of `dtype` can be put.

    Args:
        device: ``"cpu"``, ``"cuda"``, or ``"cuda:1"`` and the like; ``"auto"`` is a GPU if torch finds one.
        dtype: one of `DTYPES`.

    Raises:
        ConfigError: an unknown name, or a GPU that isn't there.
    """
    if device == AUTO:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ConfigError(
            f"device is {device!r}; expected auto, cpu, cuda, or cuda:N with the number of a GPU."
        )
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; expected one of {list(DTYPES)}.")
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device is {device!r}, but torch finds no GPU; expected one and a torch build with CUDA. Use --device cpu."
        )
    if place.index is not None and place.index >= torch.cuda.device_count():
        raise ConfigError(
            f"device is {device!r}, but torch finds {torch.cuda.device_count()} GPUs; expected a number below that."
        )
    return device


def read_routing(
    name: str,
    revision: str | None = None,
    *,
    tier: float | None = None,
    method: str | None = None,
    action: str | None = None,
    schedule: str | None = None,
    pool: str | None = None,
    config: str | Path | None = None,
) -> RoutingConfig:
    """The routing of a named model, from its config alone.

    Args:
        name: see `load_model`.
        revision: see `load_model`.
        tier: see `reroute_fx.compile`, as for the next four; None stands for a default.
        method: who is kept.
        action: what happens to the others.
        schedule: ``"exact"`` or ``"paper"``.
        pool: ``"row"`` or ``"image"``.
        config: JSON file with a `RoutingConfig`, instead of these.

    Raises:
        ConfigError: no such model, or a routing that it can't have.
    """
    about = _read_about(name, revision)
    if not hasattr(about.get_text_config(decoder=True), "num_hidden_layers"):
        raise ConfigError(f"model is {name!r} and has no decoder layers; expected a vision-language model.")
    return choose_config(
        config,
        about,
        grids=has_grids(about),
        tier=tier,
        method=method,
        action=action,
        schedule=schedule,
        pool=pool,
    )


def load_model(name: str, device: str, dtype: str, revision: str | None = None) -> NamedModel:
    """A model with its weights.

    Args:
        name: model id, folder, or ``"demo"`` for the one that ships with the package.
        device: what `choose_device` returned.
        dtype: one of `DTYPES`; ``"auto"`` is that of the checkpoint.
        revision: branch, tag or commit of a model id; None for the newest of its main branch.

    Raises:
        ConfigError: it can't be found or has no weights or no processor, or a revision is given of what has none.
    """
    wanted = dtype if dtype == AUTO else getattr(torch, dtype)
    source = _source(name, revision)
    try:
        processor = AutoProcessor.from_pretrained(**source)
        model = AutoModelForImageTextToText.from_pretrained(**source, dtype=wanted)
    except (OSError, ValueError) as error:
        raise _no_model(name, revision, "config, weights and processor", error) from error
    return NamedModel(model.eval().to(device), processor)


def build_without_weights(name: str, revision: str | None = None) -> Any:
    """A model on the meta device, from its config alone.

    Args:
        name: see `load_model`; the path of a config.json will do too.
        revision: see `load_model`.

    Raises:
        ConfigError: no such model.
        UnsupportedModelError: transformers can't build a vision-language model from its config.
    """
    about = _read_about(name, revision)
    dtype = getattr(about, "dtype", None) or torch.bfloat16
    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(about, dtype=dtype).eval()
    except ValueError as error:
        raise UnsupportedModelError(
            f"{type(about).__name__} is no vision-language model that transformers can build; expected one such "
            f"as LLaVA-1.5 or Qwen2.5-VL."
        ) from error


def _read_about(name: str, revision: str | None) -> Any:
    """What transformers knows of a model before it is built."""
    if name.endswith(".json") and not Path(name).is_file():
        raise ConfigError(f"model is {name!r}; expected an existing config.json.")
    source = _source(name, revision)
    try:
        return AutoConfig.from_pretrained(**source)
    except (OSError, ValueError) as error:
        raise _no_model(name, revision, "a config.json", error) from error


def _source(name: str, revision: str | None) -> dict[str, str]:
    """Where `from_pretrained` finds a model."""
    place = str(CHECKPOINT) if name == DEMO else name
    if revision is None:
        return {"pretrained_model_name_or_path": place}
    if Path(place).exists():
        raise ConfigError(
            f"revision is {revision!r}, but model is {name!r}, which is on this machine and has no revisions; expected "
            f"the id of a model on the hub. Leave revision out."
        )
    return {"pretrained_model_name_or_path": place, "revision": revision}


def _no_model(name: str, revision: str | None, content: str, error: Exception) -> ConfigError:
    which = f" and revision {revision!r}" if revision else ""
    return ConfigError(
        f"model is {name!r}{which}; expected 'demo', a model id, or a folder with {content}. {first_line(error)}"
    )


def name_of(model_config: Any) -> str:
    """Id of a model, or the last part of its folder's path; empty if it has none."""
    given = str(model_config.name_or_path or "")
    return Path(given).name if Path(given).exists() else given
