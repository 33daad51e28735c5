"""The main table of the paper on a checkpoint: unrouted, and every method, action and tier of the official release.

    pip install 'reroute-fx[eval]'
    python benchmarks/paper_table.py llava-hf/llava-1.5-7b-hf --family llava --output-json table.json

The release's 38 configurations are 19 for each of two models; this runs the 19 for the model that is given. Scores are
those of lmms-eval. What is in the JSON already is not run again.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from reroute_fx.analysis.paper_configs import RELEASED
from reroute_fx.benchmarking.machine import environment
from reroute_fx.command_line.options import Device, Dtype, Revision
from reroute_fx.common.json_files import check_file, write_json
from reroute_fx.errors import InputError, RerouteError
from reroute_fx.evals.tasks import (
    SHAPES_REFER,
    SHAPES_YES_NO,
    check_family,
    paper_tasks,
    write_tasks,
)
from reroute_fx.loading.models_by_name import choose_device
from reroute_fx.methods import UNROUTED
from reroute_fx.methods.tiers import TIERS
from reroute_fx.passes import ACTIONS

Configuration = tuple[str, str, int | None]
"""Method, action and tier."""


def configurations() -> list[Configuration]:
    """In the order of the paper's table, the unrouted model first."""
    routed = [(method, action, tier) for tier in TIERS for method in RELEASED for action in ACTIONS]
    return [(UNROUTED, ACTIONS[-1], None), *routed]


_SHARES = ("refcoco_ACC@0.5", "pope_f1_score", "exact_match")
_POINTS = ("gpt_eval_score", "mme_perception_score")


def evaluate(
    model: str, configuration: Configuration, tasks: Sequence[str], folder: str, **options: Any
) -> dict[str, float]:
    """The main score of each task, in percent but for MME."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from reroute_fx.evals.lmms import RerouteFx

    method, action, tier = configuration
    limit, batch = options.pop("limit"), options["batch_size"]
    routed = RerouteFx(model, tier or TIERS[0], method, action, "paper", **options)
    try:
        found = simple_evaluate(
            model=routed,
            tasks=list(tasks),
            task_manager=TaskManager(include_path=folder),
            batch_size=batch,
            limit=limit,
        )
    except (ConnectionError, FileNotFoundError, OSError) as error:
        raise InputError(_where_to_put(tasks, error)) from error
    return {task: main_score(found["results"][task]) for task in tasks}


def main_score(results: Mapping[str, Any]) -> float:
    """Of what lmms-eval reports for a task, the score that the paper prints."""
    for metric in (*_SHARES, *_POINTS):
        value = results.get(f"{metric},none")
        if value is not None:
            return float(value) * (100 if metric in _SHARES else 1)
    raise InputError(f"lmms-eval reported {sorted(results)}; expected one of {[*_SHARES, *_POINTS]}.")


def _where_to_put(tasks: Sequence[str], error: Exception) -> str:
    return (
        f"The data of a task in {list(tasks)} is not there: {error}. Expected the data sets lmms-lab-encoder/RefCOCO, "
        f"RefCOCOplus, RefCOCOg, POPE, GQA, MMBench and MME of the Hugging Face hub in its cache. On a machine with a "
        f"network run `hf download --repo-type dataset lmms-lab-encoder/RefCOCO`, and so on, and copy the folder that "
        f"HF_HOME names to this one; or choose --tasks {SHAPES_REFER},{SHAPES_YES_NO}, which need no network."
    )


def show(records: Sequence[Mapping[str, Any]], tasks: Sequence[str], console: Console) -> None:
    """The paper's table: a line for each configuration, and its mean share of the unrouted scores."""
    table = Table("tokens", "method", "action", *tasks, "% of unrouted")
    unrouted = next((r["scores"] for r in records if r["tier"] is None), None)
    for record in records:
        scores = record["scores"]
        share = ""
        if unrouted and all(unrouted.values()):
            share = f"{100 * statistics.mean(scores[task] / unrouted[task] for task in tasks):.1f}"
        cells = [str(record["tier"] or ""), record["method"], record["action"]]
        table.add_row(
            *cells,
            *(f"{scores[task]:.1f}" for task in tasks),
            share,
            end_section=record["action"] == ACTIONS[-1],
        )
    console.print(table)


def main(
    model: Annotated[str, typer.Argument(help="model id or folder, or 'demo'")],
    family: Annotated[
        str, typer.Option(help="llava, qwen2_5_vl or qwen3_vl: how boxes are asked for")
    ] = "llava",
    tasks: Annotated[str, typer.Option(help="with commas between; the paper's if left out")] = "",
    limit: Annotated[int | None, typer.Option(help="prompts of each task")] = None,
    num_prompts: Annotated[
        int, typer.Option(min=1, metavar="N", help="of each task on generated scenes")
    ] = 200,
    output_json: Annotated[Path, typer.Option(metavar="FILE", help="for all scores; added to")] = Path(
        "paper_table.json"
    ),
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Annotated[str, typer.Option(help="inductor or eager")] = "inductor",
    batch_size: Annotated[int, typer.Option(min=1, help="prompts of a call")] = 1,
) -> None:
    """Run what is not in the JSON yet, and print the table."""
    console = Console()
    try:
        check_family(family)
        check_file(output_json)
        device = choose_device(device, dtype)
        names = tasks.split(",") if tasks else paper_tasks(family)
        options: dict[str, Any] = {
            "device": device,
            "dtype": dtype,
            "backend": backend,
            "batch_size": batch_size,
            "revision": revision,
        }
        if family == "qwen2_5_vl":
            options["max_pixels"] = 576 * 28 * 28
        records = json.loads(output_json.read_text())["records"] if output_json.exists() else []
        done = {(r["method"], r["action"], r["tier"]) for r in records}
        with TemporaryDirectory() as folder:
            write_tasks(folder, num_prompts)
            for configuration in configurations():
                if configuration not in done:
                    scores = evaluate(model, configuration, names, folder, limit=limit, **options)
                    method, action, tier = configuration
                    records.append({"method": method, "action": action, "tier": tier, "scores": scores})
                    write_json(
                        output_json,
                        {
                            "environment": environment(torch.device(device)),
                            "model": model,
                            "records": records,
                        },
                    )
        show(records, names, console)
    except RerouteError as error:
        console.print(
            f"{type(error).__name__}: {error}", style="red", highlight=False, markup=False, soft_wrap=True
        )
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
