"""What a model is wrapped or packed in when it comes: taken off, or refused by name."""

from typing import Any

import torch

from ..errors import UnsupportedModelError

_CAPTURED_FORMATS = ("torchao",)
"""Formats of quantised weights that torch.export takes, as tensors of their own kind."""


def unwrap(model: Any) -> tuple[torch.nn.Module, str]:
    """The Hugging Face model inside a wrapper of PEFT, its adapters included, and where it was found, in words.

    Raises:
        UnsupportedModelError: another wrapper, adapters that are no part of the model, or packed weights.
    """
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModelError(
            "model is what torch.compile returned; expected the model itself, which reroute_fx compiles. Pass the "
            "model that torch.compile was given."
        )
    source = ""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        source = f"base model of {type(model).__name__}, adapters {_names(model)}"
        outside = [
            name for name, config in _configs(model).items() if getattr(config, "is_prompt_learning", False)
        ]
        if outside:
            raise UnsupportedModelError(
                f"model is a {type(model).__name__} whose adapters {outside} are prompts in front of the model's; "
                f"expected adapters inside its layers, such as LoRA. Pass model.get_base_model() to do without them."
            )
        model = model.get_base_model()
    _refuse_packed_weights(model)
    return model, source


def _configs(model: Any) -> dict[str, Any]:
    return dict(model.peft_config)


def _names(model: Any) -> str:
    active = getattr(model, "active_adapters", list(_configs(model)))
    return ", ".join([active] if isinstance(active, str) else active)


def _refuse_packed_weights(model: Any) -> None:
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return
    given = config.get("quant_method") if isinstance(config, dict) else config.quant_method
    name = str(getattr(given, "value", given))
    if name not in _CAPTURED_FORMATS:
        raise UnsupportedModelError(
            f"model has weights packed by {name!r}, which torch.export can't capture; expected plain weights or "
            f"those of {', '.join(_CAPTURED_FORMATS)}. Load the model without quantization_config, or with "
            f"TorchAoConfig."
        )
