"""`reroute-fx paper`: what the paper's authors released."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from .options import PrintJson
from .terminal import OUTPUT, refusals

if TYPE_CHECKING:
    from ..analysis.paper_configs import PaperConfig

paper = typer.Typer(help="Look at what the paper's authors released.", no_args_is_help=True)


@paper.callback()
def of_the_paper() -> None:
    """Keep this a group while it has a single command."""


@paper.command()
@refusals()
def configs(as_json: PrintJson = False) -> None:
    """List the configurations of the official Reroute release, with what they truly average and cost."""
    from ..analysis.paper_configs import paper_configs

    entries = paper_configs()
    if as_json:
        print(json.dumps([_record(entry) for entry in entries]))
        return
    for family in dict.fromkeys(entry.family for entry in entries):
        OUTPUT.print(_family_table(family, [e for e in entries if e.family == family]))
    OUTPUT.print("576 visual and 40 text tokens, 16-bit cache, scoring counted.")
    OUTPUT.print("Bold: more than 2 tokens away from the tier in the name.")


def _family_table(family: str, entries: Sequence["PaperConfig"]) -> Table:
    table = Table(title=f"{family}, 7B decoder", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for heading in ("configuration", "layers", "kept of 576"):
        table.add_column(heading, no_wrap=True)
    for heading in ("mean", "TFLOPs", "MiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in entries:
        config, cost = entry.config, entry.cost
        off = entry.tier is not None and abs(entry.average_tokens - entry.tier) > 2
        table.add_row(
            entry.name.removeprefix(f"{family}/"),
            " ".join(map(str, config.decision_layers)) if config else "",
            " ".join(map(str, config.keep_counts())) if config else "",
            Text(f"{entry.average_tokens:.1f}", style="bold" if off else ""),
            f"{cost.flops / 1e12:.2f}",
            f"{cost.kv_bytes / 2**20:.1f}",
        )
    return table


def _record(entry: "PaperConfig") -> dict[str, Any]:
    config = entry.config
    return {
        "name": entry.name,
        "action": config.action if config else None,
        "decision_layers": list(config.decision_layers) if config else [],
        "keep_counts": list(config.keep_counts()) if config else [],
        "average_tokens": entry.average_tokens,
        "flops": entry.cost.flops,
        "kv_bytes": entry.cost.kv_bytes,
    }
