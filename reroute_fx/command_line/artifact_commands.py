"""`reroute-fx artifact`: routed models on disk."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import (
    FORMATS,
    Action,
    Config,
    Device,
    Dtype,
    Image,
    MaxNewTokens,
    Method,
    Model,
    Pool,
    PrintJson,
    Prompt,
    Revision,
    Schedule,
    Tier,
    choices,
)
from .terminal import MESSAGES, OUTPUT, refusals

if TYPE_CHECKING:
    from ..config.limits import Limits

artifact = typer.Typer(
    help="Write, look at and run routed models on disk, which need no model class.", no_args_is_help=True
)
_LIMITS = "Largest call"

Folder = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="folder that export wrote")]


@artifact.command()
@refusals()
def export(
    model: Model,
    output_dir: Annotated[Path, typer.Argument(metavar="OUTPUT_DIR", help="folder to make")],
    tier: Tier = None,
    method: Method = None,
    action: Action = None,
    schedule: Schedule = None,
    pool: Pool = None,
    config: Config = None,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_batch_size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="rows", show_default="16", rich_help_panel=_LIMITS)
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="tokens of a row, the answer included",
            show_default="the model's, up to 8192",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    max_image_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="visual tokens of a picture",
            show_default="a row's, up to 4096",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            metavar=choices(FORMATS),
            help="machine code of this kind of machine, ONNX files, or engines",
        ),
    ] = "aot",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an artifact")] = False,
) -> None:
    """Write a routed model as an artifact that generates without the model's class."""
    from .. import api
    from ..artifact import ArtifactReport, check_export, default_limits
    from ..artifact import export as write
    from ..config.limits import Limits
    from ..loading.models_by_name import choose_device, load_model, read_routing

    place = choose_device(device, dtype)
    check_export(format, place)
    _limits(Limits(), max_batch_size, max_length, max_image_tokens)
    routing = read_routing(
        model,
        revision,
        tier=tier,
        method=method,
        action=action,
        schedule=schedule,
        pool=pool,
        config=config,
    )
    with MESSAGES.status("loading and routing"):
        loaded = load_model(model, place, dtype, revision)
        routed = api.compile(loaded.model, config=routing, backend="eager")
    limits = _limits(default_limits(routed), max_batch_size, max_length, max_image_tokens)
    write(
        routed,
        output_dir,
        format=format,
        limits=limits,
        processor=loaded.processor,
        overwrite=overwrite,
        progress=True,
    )
    OUTPUT.print(ArtifactReport.of(output_dir))


def _limits(defaults: "Limits", batch: int | None, length: int | None, image_tokens: int | None) -> "Limits":
    """What is asked for; a picture is no longer than a row."""
    length = length or defaults.length
    image_tokens = image_tokens or min(defaults.image_tokens, length)
    return replace(defaults, batch=batch or defaults.batch, length=length, image_tokens=image_tokens)


@artifact.command()
@refusals()
def show(folder: Folder, as_json: PrintJson = False) -> None:
    """Show what an artifact holds, without loading it."""
    from ..artifact import ArtifactReport

    report = ArtifactReport.of(folder)
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        OUTPUT.print(report)


@artifact.command()
@refusals()
def run(
    folder: Folder,
    prompt: Prompt,
    image: Image,
    max_new_tokens: MaxNewTokens = 128,
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda|cuda:N", help="auto is what it was exported for")
    ] = "auto",
) -> None:
    """Answer a prompt with an artifact, word by word."""
    from transformers import TextStreamer

    from ..artifact import load
    from ..errors import ConfigError
    from ..loading.prompts import make_batch, read_image

    picture = read_image(image)
    with MESSAGES.status("loading"):
        model = load(folder, device=None if device == "auto" else device)
        if model.processor is None:
            raise ConfigError(f"{folder} has no processor; expected one. Export it with processor=...")
        inputs = make_batch(model.processor, model, 1, prompt, picture)
    streamer = TextStreamer(model.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
