"""The configuration that a user asks for: one that is given, one in a file, or the one that choices say."""

from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..methods import Method, register_method
from .routing_config import RoutingConfig
from .tuned_config import TunedConfig, load_config


def read_config(config: RoutingConfig | str | Path, model_config: Any = None) -> RoutingConfig:
    """A configuration as it is, or from a JSON file.

    Args:
        config: spelled out, or the path of a file.
        model_config: of the model that a file may have been tuned for; None if it isn't known.

    Raises:
        ConfigError: it is neither, or the file holds none, or was tuned for another model.
    """
    if isinstance(config, (str, Path)):
        loaded = load_config(config)
        if not isinstance(loaded, TunedConfig):
            return loaded
        if model_config is not None:
            loaded.check(model_config, config)
        return loaded.config
    if not isinstance(config, RoutingConfig):
        raise ConfigError(
            f"config is a {type(config).__name__}; expected a RoutingConfig, or the path of a JSON file with one."
        )
    return config


def choose_config(
    config: RoutingConfig | str | Path | None, model_config: Any, *, grids: bool, **choices: Any
) -> RoutingConfig:
    """The configuration that is given, or the one that the choices say.

    Args:
        config: spelled out, or the path of a JSON file with one; None for `choices`.
        model_config: of the vision-language model.
        grids: whether pictures have any size.
        choices: `tier`, `method`, `action`, `schedule` and `pool` of `RoutingConfig.from_tier`; None stands for a
            default, and `method` may be a `Method`.

    Raises:
        ConfigError: both are given, or a routing that the decoder can't have.
    """
    given = {name: value for name, value in choices.items() if value is not None}
    num_layers = model_config.get_text_config(decoder=True).num_hidden_layers
    if config is None:
        if isinstance(given.get("method"), Method):
            given["method"] = register_method(given["method"]).name
        return RoutingConfig.from_tier(**given, num_layers=num_layers, grids=grids)
    if given:
        raise ConfigError(
            f"config is given together with {', '.join(f'{name}={value!r}' for name, value in given.items())}; "
            f"expected one or the other. A config says all of it: leave them out, or change the config, "
            f"with dataclasses.replace or in its file."
        )
    chosen = read_config(config, model_config)
    chosen.check_depth(num_layers)
    return chosen
