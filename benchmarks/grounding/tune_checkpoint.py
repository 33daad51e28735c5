"""Tune a model of the grounding study on training prompts, and ask it the study's questions.

    python benchmarks/grounding/tune_checkpoint.py

writes a configuration for each tier, `tuned_<tier>.json`, and prints the share of boxes that are found on test prompts,
beside the tier's exact schedule. Without a checkpoint it is the model that ships with the package. `--from-files` asks
with the configurations that are there; `--times FILE` writes how long searches take, and asks nothing.
"""

import os
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from contenders import TIERS
from propose import accuracy

import reroute_fx
from reroute_fx.benchmarking.machine import environment
from reroute_fx.common.json_files import write_json
from reroute_fx.grounding.questions import KINDS, collect
from reroute_fx.loading.models_by_name import CHECKPOINT, load_model
from reroute_fx.tuning.read_prompts import demo_prompts

CONFIGS = Path(__file__).parent.parent / "results"


def main(
    checkpoint: Annotated[Path, typer.Argument(help="folder with model and processor")] = CHECKPOINT,
    folder: Annotated[Path, typer.Option(help="where configurations are")] = CONFIGS,
    tiers: Annotated[str, typer.Option(help="with commas between")] = ",".join(map(str, TIERS)),
    trials: Annotated[int, typer.Option(min=1, help="of each search")] = 200,
    num_prompts: Annotated[int, typer.Option(min=12, help="of the training split, without labels")] = 64,
    seeds: Annotated[int, typer.Option(min=1, help="sets of test scenes")] = 3,
    count: Annotated[int, typer.Option(min=1, help="test prompts of each set")] = 300,
    from_files: Annotated[bool, typer.Option("--from-files", help="tune nothing")] = False,
    times: Annotated[Path | None, typer.Option(help="for seconds of searches, as JSON")] = None,
) -> None:
    """Tune for each tier, then ask."""
    searches: list[dict[str, Any]] = []
    loaded = load_model(str(checkpoint), "cpu", "float32")
    model, processor = loaded.model, loaded.processor
    layers = model.config.text_config.num_hidden_layers
    prompts = [prompt for seed in range(seeds) for prompt in collect("test", seed, count, KINDS[0])]
    for tier in map(int, tiers.split(",")):
        path = folder / f"tuned_{tier}.json"
        if not from_files:
            start = time.perf_counter()
            tuned = reroute_fx.tune(
                model, demo_prompts(num_prompts), tier, processor=processor, trials=trials
            )
            seconds = round(time.perf_counter() - start, 1)
            print(tuned)
            tuned.save(path)
            searches.append(
                {
                    "tier": tier,
                    "prompts": num_prompts,
                    "trials": trials,
                    "cores": _cores(),
                    "seconds": seconds,
                }
            )
        if times is not None:
            write_json(times, {"environment": environment(torch.device("cpu")), "searches": searches})
            continue
        for name, config in (
            ("tuned", path),
            ("pdrop", reroute_fx.RoutingConfig.from_tier(tier, num_layers=layers)),
        ):
            routed = reroute_fx.compile(model, config=config, backend="eager")
            print(f"{tier}, {name}: {accuracy(routed, processor, prompts):.1f} of {len(prompts)}", flush=True)


def _cores() -> int:
    """On which trials are measured."""
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    typer.run(main)
