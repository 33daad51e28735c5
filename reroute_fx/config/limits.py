"""What a program that is compiled ahead of time has to serve."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from ..errors import ConfigError, InputError


@dataclass(frozen=True)
class Limits:
    """The largest call of an artifact.

    Attributes:
        batch: rows.
        length: tokens of a row: padding, prompt and answer.
        image_tokens: visual tokens of one image or video.

    Raises:
        ConfigError: a limit is no whole number above 0, or an image is longer than a row.
    """

    batch: int = 16
    length: int = 8192
    image_tokens: int = 4096

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"limits.{name} is {value!r}; expected a whole number of 1 or more.")
        if self.image_tokens > self.length:
            raise ConfigError(
                f"limits.image_tokens is {self.image_tokens}; expected at most limits.length={self.length}: an image "
                f"is part of a row."
            )

    def check(self, batch: int, length: int) -> None:
        """Raise InputError unless a call may have `batch` rows that hold `length` tokens after it."""
        for name, asked in (("batch", batch), ("length", length)):
            if asked > getattr(self, name):
                raise self._exceeded(name, asked)

    def check_images(self, images: Sequence[Sequence[int]]) -> None:
        """Raise InputError unless pictures may have so many visual tokens, for each row."""
        largest = max((tokens for row in images for tokens in row), default=0)
        if largest > self.image_tokens:
            raise self._exceeded("image_tokens", largest)

    def _exceeded(self, name: str, asked: int) -> InputError:
        what = {"batch": "rows", "length": "tokens in a row", "image_tokens": "visual tokens in a picture"}[
            name
        ]
        return InputError(
            f"The call has {asked} {what}; expected at most limits.{name}={getattr(self, name)}. Nothing was run. Send "
            f"less, or export the model with larger limits."
        )
