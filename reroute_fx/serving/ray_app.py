"""Replicas of a server on a Ray cluster: the same application in a deployment of Ray Serve, one engine in each."""

from typing import TYPE_CHECKING, Any

from ..common.optional_libraries import optional_library
from .start import Settings, read_key, start_service

if TYPE_CHECKING:
    from fastapi import FastAPI

NAME = "reroute_fx"
"""Of the deployment, in configs of Ray Serve."""


class Replica:
    """A server in a process of Ray's; `app` is its application."""

    app: "FastAPI"

    def check_health(self) -> None:
        """Raise, so that Ray replaces the replica, if its engine has ended."""
        if not self.app.state.engine.is_alive:
            raise RuntimeError("The engine has ended.")


def app(settings: Settings) -> Any:
    """The application for Ray Serve, ``import_path: reroute_fx.serving.ray_app:app``; its ``args`` are the settings.

    A replica takes twice as many requests as it has rows, so that some wait while others run; those beyond wait at
    Ray's proxies. One that stops finishes what it has. The API key is in the environment of the replicas: `read_key`.

    Raises:
        BackendUnavailableError: Ray Serve is not installed.
        ConfigError: a bound that is no number above 0.
    """
    serve = optional_library("ray.serve", "ray", "to serve on a cluster")
    rows, seconds = settings.max_batch_size, settings.bounds.seconds

    def build() -> "FastAPI":
        from .http_app import make_app

        return make_app(start_service(settings, read_key(None, "localhost")))

    deployment = serve.deployment(
        serve.ingress(build)(Replica),
        name=NAME,
        max_ongoing_requests=2 * rows,
        max_queued_requests=settings.max_queue,
        graceful_shutdown_timeout_s=seconds,
    )
    return deployment.bind()
