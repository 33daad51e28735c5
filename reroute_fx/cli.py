"""Command line: `reroute-fx`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .config import METHODS, SCHEDULES
from .errors import RerouteError
from .lowering import BACKENDS
from .passes import ACTIONS

app = typer.Typer(
    help="Route the visual tokens of vision-language models.", no_args_is_help=True, add_completion=False
)
_console = Console()
_errors = Console(stderr=True)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="model id, folder, or config.json; weights are not needed")],
    tier: Annotated[float, typer.Option(help="192, 128, 64, or the share of tokens kept")] = 128,
    method: Annotated[str, typer.Option(help=" or ".join(METHODS))] = "pdrop",
    action: Annotated[str, typer.Option(help=", ".join(ACTIONS))] = "compact_route_stagewise",
    schedule: Annotated[str, typer.Option(help=" or ".join(SCHEDULES))] = "exact",
    visual_tokens: Annotated[int, typer.Option(min=1, help="visual tokens of the prompt")] = 576,
    text_tokens: Annotated[int, typer.Option(min=1, help="text tokens of the prompt")] = 40,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """What routing would do to a model: layers found, tokens, FLOPs and cache, without its weights."""
    from . import api

    try:
        with _console.status("capturing the decoder on the meta device"):
            report = api.inspect(_meta_model(model), tier, method=method, action=action, schedule=schedule)
    except RerouteError as error:
        _fail(error)
    report = report.at(visual_tokens=visual_tokens, text_tokens=text_tokens)
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        _console.print(report)


@app.command()
def configs(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """The configurations of the official Reroute release, with what they truly average and cost."""
    from .paper import paper_configs

    table = Table(
        "configuration",
        "layers",
        "kept of 576",
        "average",
        "TFLOPs",
        "scoring GFLOPs",
        "cache MiB",
        title="7B decoders, 576 visual and 40 text tokens, 16-bit cache",
    )
    records = []
    for entry in paper_configs():
        config, cost = entry.config, entry.cost
        layers = list(config.decision_layers) if config else []
        kept = list(config.keep_counts()) if config else []
        records.append({"name": entry.name, "decision_layers": layers, "keep_counts": kept})
        records[-1] |= {"action": config.action if config else None, "average_tokens": entry.average_tokens}
        records[-1] |= {"flops": cost.flops, "kv_bytes": cost.kv_bytes}
        off = entry.tier is not None and abs(entry.average_tokens - entry.tier) > 2
        table.add_row(
            entry.name,
            " ".join(map(str, layers)),
            " ".join(map(str, kept)),
            f"[bold]{entry.average_tokens:.1f}[/]" if off else f"{entry.average_tokens:.1f}",
            f"{cost.layer_flops / 1e12:.2f}",
            f"{cost.scoring_flops / 1e9:.1f}",
            f"{cost.kv_bytes / 2**20:.1f}",
        )
    for column in table.columns[3:]:
        column.justify = "right"
    if as_json:
        print(json.dumps(records))
    else:
        _console.print(table, "Bold: more than 2 tokens away from the tier in the name.", sep="\n")


@app.command()
def demo(backend: Annotated[str, typer.Option(help=" or ".join(BACKENDS))] = "inductor") -> None:
    """Compile, generate and time two small models with random weights; nothing is downloaded."""
    from .demo import run

    try:
        run(backend, _console)
    except RerouteError as error:
        _fail(error)


def _meta_model(name: str) -> Any:
    """A model without weights from an id, a folder or a config file."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from .errors import ConfigError, UnsupportedModelError

    path = Path(name)
    if path.suffix == ".json" and not path.is_file():
        raise ConfigError(f"model is {name!r}; expected an existing config.json.")
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"model is {name!r}; expected a model id, a folder or a config.json. {first}") from error
    dtype = getattr(config, "dtype", None) or torch.bfloat16
    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    except ValueError as error:
        raise UnsupportedModelError(
            f"{type(config).__name__} is no vision-language model that transformers can build; expected one such "
            f"as LLaVA-1.5 or Qwen2.5-VL."
        ) from error


def _fail(error: RerouteError) -> None:
    _errors.print(f"{type(error).__name__}: {error}", style="red", highlight=False, soft_wrap=True)
    raise typer.Exit(2)
