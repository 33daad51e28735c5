"""Arguments and options that several commands take: named, explained and grouped alike wherever they stand.

Help should not wait for torch, so that the choices of the package are repeated here.
"""

from pathlib import Path
from typing import Annotated

import typer

ACTIONS = ("physical_delete", "compact_route", "compact_route_stagewise")
BACKENDS = ("inductor", "eager", "tensorrt")
FORMATS = ("aot", "onnx", "tensorrt")
POOLS = ("row", "image")
SCHEDULES = ("exact", "paper")

_ROUTING, _MODEL = "Routing", "Model"


def choices(names: tuple[str, ...]) -> str:
    """As they stand in the help; another one is refused by the package, which knows them best."""
    return "|".join(names)


# What is routed. Left out is None, so that --config can refuse what is given beside it.
Tier = Annotated[
    float | None,
    typer.Option(
        metavar="192|128|64|SHARE",
        help="visual tokens of 576 that enter a layer on average, or the share of them",
        show_default="128, or the method's own",
        rich_help_panel=_ROUTING,
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="who is kept: a name that `reroute-fx methods` lists, or none",
        show_default="pdrop",
        rich_help_panel=_ROUTING,
    ),
]
Action = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"what happens to the others: {', '.join(ACTIONS)}",
        show_default=ACTIONS[-1],
        rich_help_panel=_ROUTING,
    ),
]
Schedule = Annotated[
    str | None,
    typer.Option(
        metavar=choices(SCHEDULES),
        help="keep the tier's promise, or take the released ratios as they are",
        show_default=SCHEDULES[0],
        rich_help_panel=_ROUTING,
    ),
]
Pool = Annotated[
    str | None,
    typer.Option(
        metavar=choices(POOLS),
        help="let all visual tokens of a prompt compete, or those of each picture",
        show_default=POOLS[0],
        rich_help_panel=_ROUTING,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="instead of these: a RoutingConfig as JSON",
        rich_help_panel=_ROUTING,
    ),
]

# Which model, and where it runs.
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="model id or folder with weights, or 'demo' for a small one", show_default=False
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="branch, tag or commit of a model id on the hub", rich_help_panel=_MODEL
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="auto|cpu|cuda|cuda:N", help="auto is a GPU if there is one", rich_help_panel=_MODEL
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="auto, which is that of the checkpoint, float32, bfloat16 or float16",
        rich_help_panel=_MODEL,
    ),
]

# What is asked, and what is printed.
Backend = Annotated[str, typer.Option(metavar=choices(BACKENDS), help="what runs the routed program")]
Prompt = Annotated[str, typer.Option(metavar="TEXT", help="text behind the picture", show_default=False)]
Image = Annotated[Path, typer.Option(metavar="FILE", help="picture", show_default=False)]
MaxNewTokens = Annotated[int, typer.Option(min=1, metavar="N", help="most tokens of the answer")]
PrintJson = Annotated[bool, typer.Option("--json", help="print JSON")]

# What a model is asked, without labels.
Prompts = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help='a line {"image": "cat.png", "text": "Where is the cat?"} for each prompt; demo does without',
        show_default=False,
    ),
]
NumPrompts = Annotated[int, typer.Option(min=1, metavar="N", help="the first ones of these")]
