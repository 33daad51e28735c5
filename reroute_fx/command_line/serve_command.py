"""`reroute-fx serve`."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Action, Backend, Config, Device, Dtype, Method, Pool, Revision, Schedule
from .terminal import MESSAGES, refusals

_BOUNDS, _ADDRESS = "The most", "Address"


@refusals()
def serve(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|ARTIFACT",
            help="model id, folder with weights or with an artifact, or 'demo' for a small model",
            show_default=False,
        ),
    ],
    tier: Annotated[
        str | None,
        typer.Option(
            metavar="192,128,64",
            help="visual tokens of 576 that enter a layer on average; of several, requests choose one",
            show_default="128, or the method's own",
            rich_help_panel="Routing",
        ),
    ] = None,
    method: Method = None,
    action: Action = None,
    schedule: Schedule = None,
    pool: Pool = None,
    config: Config = None,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "inductor",
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="where to listen", rich_help_panel=_ADDRESS)
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", rich_help_panel=_ADDRESS)] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="with the key that requests bring; or set REROUTE_FX_API_KEY",
            rich_help_panel=_ADDRESS,
        ),
    ] = None,
    allow_picture_urls: Annotated[
        bool,
        typer.Option(
            "--allow-picture-urls",
            help="fetch pictures from public addresses of the web",
            rich_help_panel=_ADDRESS,
        ),
    ] = False,
    max_batch_size: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="answers that grow at once in a tier", rich_help_panel=_BOUNDS),
    ] = 8,
    max_length: Annotated[
        int,
        typer.Option(min=2, metavar="N", help="tokens of a prompt and its answer", rich_help_panel=_BOUNDS),
    ] = 1024,
    max_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="tokens of an answer", rich_help_panel=_BOUNDS)
    ] = 512,
    max_queue: Annotated[
        int, typer.Option(min=1, metavar="N", help="requests that wait", rich_help_panel=_BOUNDS)
    ] = 64,
    max_pixels: Annotated[
        int, typer.Option(min=1, metavar="N", help="pixels of a picture", rich_help_panel=_BOUNDS)
    ] = 2**24,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="for a request", rich_help_panel=_BOUNDS)
    ] = 300.0,
    workers: Annotated[
        int, typer.Option(min=1, metavar="N", help="processes that prepare pictures and prompts")
    ] = 1,
) -> None:
    """Serve a model to clients of OpenAI's API."""
    from ..common.optional_libraries import optional_library

    for library in ("fastapi", "uvicorn", "prometheus_client", "httpcore"):
        optional_library(library, "serve", "to serve")
    from ..serving import start

    settings = start.Settings(
        model=model,
        tier=tier,
        method=method,
        action=action,
        schedule=schedule,
        pool=pool,
        config=config,
        revision=revision,
        device=device,
        dtype=dtype,
        backend=backend,
        allow_picture_urls=allow_picture_urls,
        max_batch_size=max_batch_size,
        max_length=max_length,
        max_tokens=max_tokens,
        max_queue=max_queue,
        max_pixels=max_pixels,
        timeout=timeout,
        workers=workers,
    )
    key = start.read_key(api_key_file, host)
    with MESSAGES.status("loading and compiling"):
        service = start.start_service(settings, key)
    MESSAGES.print(
        f"{service.name}, tiers {', '.join(service.engine.tiers)}: http://{host}:{port}/v1", markup=False
    )
    start.run(service, host, port)
