"""Tune the model that ships with the package on training prompts, and ask it the questions of the grounding study.

    python benchmarks/grounding/tune_demo.py

writes a configuration for each tier, `tuned_<tier>.json`, and prints the share of boxes that are found on test prompts,
beside the tier's exact schedule. `--from-files` asks with the configurations that are there.
"""

from pathlib import Path
from typing import Annotated

import typer
from contenders import TIERS
from propose import accuracy

import reroute_fx
from reroute_fx.grounding.questions import KINDS, collect
from reroute_fx.loading.models_by_name import DEMO, load_model
from reroute_fx.tuning.read_prompts import demo_prompts

CONFIGS = Path(__file__).parent.parent / "results"


def main(
    folder: Annotated[Path, typer.Option(help="where configurations are")] = CONFIGS,
    tiers: Annotated[str, typer.Option(help="with commas between")] = ",".join(map(str, TIERS)),
    trials: Annotated[int, typer.Option(min=1, help="of each search")] = 200,
    num_prompts: Annotated[int, typer.Option(min=12, help="of the training split, without labels")] = 64,
    seeds: Annotated[int, typer.Option(min=1, help="sets of test scenes")] = 3,
    count: Annotated[int, typer.Option(min=1, help="test prompts of each set")] = 300,
    from_files: Annotated[bool, typer.Option("--from-files", help="tune nothing")] = False,
) -> None:
    """Tune for each tier, then ask."""
    loaded = load_model(DEMO, "cpu", "float32")
    model, processor = loaded.model, loaded.processor
    layers = model.config.text_config.num_hidden_layers
    prompts = [prompt for seed in range(seeds) for prompt in collect("test", seed, count, KINDS[0])]
    for tier in map(int, tiers.split(",")):
        path = folder / f"tuned_{tier}.json"
        if not from_files:
            tuned = reroute_fx.tune(
                model, demo_prompts(num_prompts), tier, processor=processor, trials=trials
            )
            print(tuned)
            tuned.save(path)
        for name, config in (
            ("tuned", path),
            ("pdrop", reroute_fx.RoutingConfig.from_tier(tier, num_layers=layers)),
        ):
            routed = reroute_fx.compile(model, config=config, backend="eager")
            print(f"{tier}, {name}: {accuracy(routed, processor, prompts):.1f} of {len(prompts)}", flush=True)


if __name__ == "__main__":
    typer.run(main)
