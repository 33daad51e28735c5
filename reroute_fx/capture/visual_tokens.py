"""Which token ids of a prompt stand for image or video features."""

from typing import Any

from ..errors import UnsupportedModelError

_FIELDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def find_visual_token_ids(config: Any) -> tuple[int, ...]:
    """Ids of the placeholders of visual features, from a model's config.

    Raises:
        UnsupportedModelError: the config has none, so the model is no vision-language model.
    """
    ids = {token for name in _FIELDS if (token := getattr(config, name, None)) is not None}
    if not ids:
        raise UnsupportedModelError(
            f"{type(config).__name__} names no image or video token; expected a vision-language model with one of "
            f"{', '.join(_FIELDS)} in its config."
        )
    return tuple(sorted(ids))
