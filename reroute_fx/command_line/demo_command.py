"""`reroute-fx demo`."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Backend
from .terminal import OUTPUT, refusals


@refusals()
def demo(
    backend: Backend = "inductor",
    scene: Annotated[
        int,
        typer.Option(
            metavar="N", help="number of a generated scene; 8 is one where deleting loses the thing"
        ),
    ] = 8,
    output_dir: Annotated[Path, typer.Option(metavar="FOLDER", help="for the pictures")] = Path("demo"),
) -> None:
    """Ask a small trained model for a thing in a scene: unrouted, with deleted and with routed tokens."""
    _quiet_imports()
    from ..lowering import check_backend
    from .demo import run

    check_backend(backend)
    run(backend, OUTPUT, scene, output_dir)


def _quiet_imports() -> None:
    """Show errors only of what torch and torchao log as they are imported: neither is what the demo is about."""
    import logging

    import torch

    torch._logging.set_logs(all=logging.ERROR)  # type: ignore[attr-defined]
    logging.getLogger("torchao").setLevel(logging.ERROR)
