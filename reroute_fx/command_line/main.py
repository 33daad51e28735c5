"""Command line: `reroute-fx`. Each command, or group of commands, has a file of its own."""

from typing import Annotated

import typer

from .artifact_commands import artifact
from .bench_command import bench
from .demo_command import demo
from .inspect_command import inspect
from .lmms_commands import lmms
from .methods_command import methods
from .options import choices
from .paper_commands import paper
from .profile_command import profile
from .serve_command import serve
from .terminal import logged, refusals
from .tune_command import tune
from .visualize_command import visualize

LOG_LEVELS = ("debug", "info", "warning", "error")

app = typer.Typer(
    help="Route the visual tokens of vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
@refusals()
def main(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit"),
    ] = False,
    log_level: Annotated[
        str, typer.Option(metavar=choices(LOG_LEVELS), help="what of reroute_fx's log is shown")
    ] = "warning",
) -> None:
    """Options that are no command's."""
    if log_level not in LOG_LEVELS:
        from ..errors import ConfigError

        raise ConfigError(f"log-level is {log_level!r}; expected one of {list(LOG_LEVELS)}.")
    context.with_resource(logged(log_level))


for command in (inspect, methods, profile, tune, demo, visualize, bench, serve):
    app.command()(command)
for name, group in (("artifact", artifact), ("paper", paper), ("lmms", lmms)):
    app.add_typer(group, name=name)


if __name__ == "__main__":
    app()
