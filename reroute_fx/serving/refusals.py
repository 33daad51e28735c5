"""Errors that a request is answered with."""

from typing import Any

from ..errors import InputError, RerouteError


class RequestError(InputError):
    """A request asks for what it can't have.

    Attributes:
        field: which part of it, such as ``"messages[0].content[1].image_url.url"``.
    """

    status = 400

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}")
        self.field, self.message = field, message

    def __reduce__(self) -> Any:
        return type(self), (self.field, self.message)


class BodyTooLargeError(RequestError):
    """A request has more bytes than are read."""

    status = 413


class QueueFullError(RerouteError):
    """As many requests wait as may."""

    status = 429


class DeadlineError(RerouteError):
    """A request took longer than it may."""

    status = 504


class SlowReaderError(RerouteError):
    """A client let more of its answer lie unread than is kept."""

    status = 499


class ServingError(RerouteError):
    """Something failed that is not the request's fault; others go on."""

    status = 500
