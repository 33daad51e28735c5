"""The most that a request may ask, and that may wait."""

from dataclasses import dataclass, fields

from ..errors import ConfigError

MIB = 2**20


@dataclass(frozen=True)
class Bounds:
    """The most that a server takes; all above 0.

    Attributes:
        body_bytes: of a request.
        picture_bytes: of a picture as it was encoded.
        pixels: of a picture.
        pictures: of a request.
        prompt_characters: of all texts of a request together.
        answers: to one prompt, n.
        tokens: of an answer; also what a request gets that asks for no number.
        queue: requests that wait.
        queue_bytes: of the inputs of requests that wait.
        seconds: from a request to the end of its answer.
        unread_bytes: of an answer that its client has not taken yet.
        fetch_seconds: for a picture from a URL.
    """

    body_bytes: int = 64 * MIB
    picture_bytes: int = 16 * MIB
    pixels: int = 2**24
    pictures: int = 8
    prompt_characters: int = 100_000
    answers: int = 8
    tokens: int = 512
    queue: int = 64
    queue_bytes: int = 512 * MIB
    seconds: float = 300.0
    unread_bytes: int = MIB
    fetch_seconds: float = 10.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if (value := getattr(self, field.name)) <= 0:
                raise ConfigError(f"{field.name} is {value}; expected a number above 0.")
