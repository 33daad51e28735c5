"""Configs of single layers, where layers differ."""

from typing import Any


def layer_config(text_config: Any, layer: int) -> Any:
    """What `text_config` says of one layer: where their heads differ it says it for each (Gemma 4)."""
    is_mixed = getattr(text_config, "is_heterogeneous", False)
    return text_config.per_layer_config[layer] if is_mixed else text_config
