"""Errors that a pass can raise; the other packages build on them."""


class RerouteError(Exception):
    """Base class of every error that reroute_fx raises on purpose."""


class MatchError(RerouteError):
    """The graph does not have the form that a pass needs; the message names the nearest miss."""
