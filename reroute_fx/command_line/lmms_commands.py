"""`reroute-fx lmms`: evaluation with lmms-eval."""

from pathlib import Path
from typing import Annotated

import typer

from .terminal import OUTPUT, refusals

lmms = typer.Typer(help="Prepare evaluations with lmms-eval.", no_args_is_help=True)


@lmms.callback()
def of_lmms_eval() -> None:
    """Keep this a group while it has a single command."""


@lmms.command()
@refusals()
def tasks(
    output_dir: Annotated[Path, typer.Argument(metavar="OUTPUT_DIR", help="folder for task files and data")],
    num_prompts: Annotated[
        int, typer.Option(min=1, metavar="N", help="of each task on generated scenes")
    ] = 200,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="other seeds have other scenes")] = 0,
) -> None:
    """Write tasks for lmms-eval: two on generated scenes with their data, and the paper's by model family."""
    from ..evals.tasks import FAMILIES, paper_tasks, write_tasks

    names = write_tasks(output_dir, num_prompts, seed)
    OUTPUT.print(
        f"{len(names)} tasks in {output_dir}: lmms-eval --include_path {output_dir} --tasks ...",
        soft_wrap=True,
    )
    OUTPUT.print(f"generated scenes: {','.join(names[:2])}", soft_wrap=True)
    for family in FAMILIES:
        OUTPUT.print(f"the paper's, {family}: {','.join(paper_tasks(family))}", soft_wrap=True)
