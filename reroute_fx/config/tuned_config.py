"""A configuration that was found for a model, with what was measured: the file that tuning writes.

``{"config": {...}, "tuned": {...}}``, where a plain file has the fields of the configuration alone.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..common.json_files import write_json
from ..errors import ConfigError
from .config_files import from_file, has_part, to_plain
from .routing_config import RoutingConfig

_FORBID: dict[str, str] = {"extra": "forbid"}


@dataclass(frozen=True)
class ModelKind:
    """What a configuration is tuned for, as far as a model's config tells: weights may be trained further.

    Attributes:
        type: ``model_type`` of the config.
        layers: of the decoder.
        width: of its residual stream.
        heads: of its attention.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = _FORBID

    type: str
    layers: int
    width: int
    heads: int

    @classmethod
    def of(cls, model_config: Any) -> "ModelKind":
        """Of a vision-language model's config."""
        text = model_config.get_text_config(decoder=True)
        return cls(
            model_config.model_type, text.num_hidden_layers, text.hidden_size, text.num_attention_heads
        )

    def __str__(self) -> str:
        return f"{self.type} of {self.layers} layers, {self.heads} heads and width {self.width}"


@dataclass(frozen=True)
class TuningFacts:
    """How a configuration was found.

    Attributes:
        model: what it was found for.
        name: of the model: its class, and where it was loaded from.
        tier: as it was asked for.
        prompts: how many there were.
        held_out_prompts: of these, how many the search didn't see.
        prompts_sha256: hash of all of them.
        trials: configurations that were tried.
        seed: of the search.
        versions: of reroute_fx, torch, transformers and optuna.
        divergence: mean over the prompts that the search saw, in nats for a token.
        held_out_divergence: mean over the others.
        agreement: share of greedy tokens that stay the same, over all prompts.
        target_weight: nats that missing all targets counted, see `tune`.
        missed: share of the targets that layers run without, over all prompts; None if nobody asked.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = _FORBID

    model: ModelKind
    name: str
    tier: float
    prompts: int
    held_out_prompts: int
    prompts_sha256: str
    trials: int
    seed: int
    versions: dict[str, str]
    divergence: float
    held_out_divergence: float
    agreement: float
    target_weight: float = 0.0
    missed: float | None = None


@dataclass(frozen=True)
class TunedConfig:
    """A configuration and how it was found; a JSON file of its own form."""

    __pydantic_config__: ClassVar[dict[str, str]] = _FORBID

    config: RoutingConfig
    tuned: TuningFacts

    def save(self, path: str | Path) -> None:
        """Write it as a JSON file, whole or not at all.

        Raises:
            InputError: the folder doesn't exist, or `path` is one.
        """
        write_json(path, to_plain(self))

    def check(self, model_config: Any, source: str | Path) -> None:
        """Raise `ConfigError` unless it was tuned for models of this kind; `source` is named."""
        found = ModelKind.of(model_config)
        if found != self.tuned.model:
            raise ConfigError(
                f"{source} was tuned for a {self.tuned.model}, but the model is a {found}; expected the kind of model "
                f"that it was tuned for. Tune again for this one: which layers decide well differs from model to model."
            )


def load_config(path: str | Path) -> "RoutingConfig | TunedConfig":
    """What a file holds: a configuration alone, or one with how it was found.

    Raises:
        ConfigError: naming the file, and the first field that is missing, unknown or wrong.
    """
    return from_file(TunedConfig, path) if has_part(path, "config") else from_file(RoutingConfig, path)
