"""`reroute-fx tune`."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Action, Device, Dtype, MaxNewTokens, Model, NumPrompts, Prompts, Revision
from .terminal import MESSAGES, OUTPUT, refusals

_SEARCH = "Search"
_INTERRUPTED = 130


@refusals()
def tune(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="for the configuration", show_default=False)
    ],
    prompts: Prompts = None,
    num_prompts: NumPrompts = 64,
    tier: Annotated[
        float,
        typer.Option(
            metavar="192|128|64|SHARE",
            help="visual tokens of 576 that enter a layer on average, or their share",
        ),
    ] = 128,
    action: Action = None,
    max_new_tokens: MaxNewTokens = 32,
    trials: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="configurations to try",
            show_default="200, or what --seconds leaves time for",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=1, metavar="S", help="end in this time", show_default="none", rich_help_panel=_SEARCH
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="of the search", rich_help_panel=_SEARCH)] = 0,
    target_weight: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="NATS",
            help="how much it counts to miss what answers depend on; for answers of one word",
            rich_help_panel=_SEARCH,
        ),
    ] = 0.0,
    log: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="keep what is measured, and go on with what the file holds",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="processes on CPU", show_default="one a core", rich_help_panel=_SEARCH
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="for a picture, .png or .svg")] = None,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Find where a model should decide, on prompts without labels; --config takes what is written."""
    from ..common.json_files import check_file
    from ..common.plot_files import check_plot
    from ..loading.models_by_name import choose_device, load_model, read_routing
    from ..tuning.read_prompts import prompts_of
    from ..tuning.tune import tune as search

    place = choose_device(device, dtype)
    check_file(output)
    if plot:
        check_plot(plot)
    pairs = prompts_of(model, prompts, num_prompts)
    routing = read_routing(model, revision, tier=tier, action=action)
    with MESSAGES.status("loading"):
        loaded = load_model(model, place, dtype, revision)
    tuned = search(
        loaded.model,
        pairs,
        tier,
        processor=loaded.processor,
        trials=trials,
        seconds=seconds,
        seed=seed,
        action=routing.action,
        target_weight=target_weight,
        max_new_tokens=max_new_tokens,
        log=log,
        workers=workers,
    )
    OUTPUT.print(tuned)
    tuned.save(output)
    if plot:
        tuned.plot(plot)
    OUTPUT.print(f"Written: {output}", soft_wrap=True, highlight=False)
    if tuned.stopped == "interrupted":
        raise typer.Exit(_INTERRUPTED)
