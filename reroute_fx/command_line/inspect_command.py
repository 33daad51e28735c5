"""`reroute-fx inspect`."""

import json
from typing import Annotated

import typer

from .options import Action, Config, Method, Pool, PrintJson, Revision, Schedule, Tier
from .terminal import MESSAGES, OUTPUT, refusals


@refusals()
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="model id, folder, config.json, or 'demo'; weights are not needed"
        ),
    ],
    tier: Tier = None,
    method: Method = None,
    action: Action = None,
    schedule: Schedule = None,
    pool: Pool = None,
    config: Config = None,
    revision: Revision = None,
    visual_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="of the prompt")] = 576,
    text_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="of the prompt")] = 40,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="a100|h100|h200|b200|l4",
            help="project what its peak rates allow; nothing is measured",
            show_default=False,
        ),
    ] = None,
    as_json: PrintJson = False,
) -> None:
    """Show what routing would do to a model: layers found, tokens, FLOPs and cache, without its weights."""
    from .. import api
    from ..analysis.roofline import find_gpu, projection_dict, projection_table
    from ..loading.models_by_name import build_without_weights

    found = find_gpu(gpu) if gpu else None
    with MESSAGES.status("capturing the decoder on the meta device"):
        report = api.inspect(
            build_without_weights(model, revision),
            tier,
            method=method,
            action=action,
            schedule=schedule,
            pool=pool,
            config=config,
        )
    report = report.at(visual_tokens=visual_tokens, text_tokens=text_tokens)
    if as_json:
        projection = {"projection": projection_dict(report, found)} if found else {}
        print(json.dumps({**report.to_dict(), **projection}))
    else:
        OUTPUT.print(report)
        if found:
            OUTPUT.print(projection_table(report, found))
