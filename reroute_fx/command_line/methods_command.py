"""`reroute-fx methods`."""

import json
from typing import Annotated

import typer

from .options import PrintJson
from .terminal import OUTPUT, refusals


@refusals()
def methods(
    tier: Annotated[
        float,
        typer.Option(metavar="192|128|64|SHARE", help="at which costs are compared"),
    ] = 128,
    as_json: PrintJson = False,
) -> None:
    """Compare the ways to choose tokens: what they rank by, where they decide, what they cost at a tier."""
    from ..analysis.method_overview import compare_methods, methods_table

    rows = compare_methods(tier)
    if as_json:
        print(json.dumps([row.to_dict() for row in rows]))
        return
    OUTPUT.print(methods_table(rows))
    for row in rows:
        own = f"{row.positions} positions, {row.default_tokens:.0f} of 576 tokens if no tier is named"
        OUTPUT.print(f"{row.name}: {row.source}; {own}.", highlight=False, soft_wrap=True)
