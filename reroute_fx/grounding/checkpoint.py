"""The small LLaVA that ships with the package, trained on generated scenes; its card is in its folder."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlavaForConditionalGeneration, LlavaProcessor

from ..errors import ConfigError, first_line

CHECKPOINT = Path(__file__).parent / "model"


def load_checkpoint(folder: Path = CHECKPOINT, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The model in eval mode and its processor.

    Raises:
        ConfigError: nothing is there, or another kind of model.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != "llava":
            raise ConfigError(
                f"The checkpoint in {folder} is a {config.model_type!r} model; expected a 'llava' one, as "
                f"benchmarks/grounding/train.py writes."
            )
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        processor = LlavaProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"There is no checkpoint in {folder}; expected config, weights and processor. Train one with "
            f"benchmarks/grounding/train.py. {first_line(error)}"
        ) from error
    return model.eval(), processor
