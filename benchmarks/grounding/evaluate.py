"""The grounding study, which asks whether routing keeps what deleting loses.

    python benchmarks/grounding/evaluate.py

writes the answers of every contender to `benchmarks/results/grounding.json`, two plots beside it, and prints the table
of docs/grounding.md. `--resume` asks only contenders that the file lacks, if it has answers of the same weights;
`--tiers` asks at some tiers only. `--from-json` draws and prints again without running anything.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from contenders import BATCH, TIERS, Contender, contenders, make_inputs
from recovery import recovery
from rich.progress import Progress
from summary import markdown_table, plot_accuracy, plot_recovery

from reroute_fx.benchmarking.machine import environment
from reroute_fx.common.json_files import write_json
from reroute_fx.errors import ConfigError, UnsupportedModelError
from reroute_fx.grounding.questions import KINDS, NEAR_MISSES, Question, collect
from reroute_fx.grounding.scenes import SIDE, Scene
from reroute_fx.grounding.scoring import overlap, read_box
from reroute_fx.loading.models_by_name import CHECKPOINT, load_model

RESULTS = Path(__file__).parent.parent / "results"
Asked = tuple[Scene, Question]


def answer_all(
    contender: Contender, processor: Any, prompts: Sequence[Asked]
) -> Iterator[tuple[Question, str, Any]]:
    """Each prompt with the answer and with what was kept for it: for each decision `[N]` bool."""
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        tokens, routing = contender.answer(make_inputs(processor, batch))
        texts = processor.batch_decode(tokens, skip_special_tokens=True)
        for row, ((_, question), text) in enumerate(zip(batch, texts, strict=True)):
            kept = [] if routing is None else [layer[row] for layer in routing.all_kept.values()]
            yield question, text.strip(), kept


def record(
    contender: Contender, processor: Any, prompts: Sequence[Asked], seed: int, kind: str
) -> dict[str, Any]:
    """The answers of a contender to the prompts of a seed, and for references what was kept of the target."""
    answers, stages = [], []
    for question, text, kept in answer_all(contender, processor, prompts):
        one: dict[str, Any] = {"answer": text, "kind": question.kind, "hops": question.hops}
        if question.box is None:
            one["target"] = question.answer
        else:
            one["iou"] = round(overlap(read_box(text), question.box), 4)
            stages.append([asdict(stage) for stage in recovery(kept, question.box)])
        answers.append(one)
    return {
        "contender": contender.name,
        "tier": contender.tier,
        "seed": seed,
        "kind": kind,
        "answers": answers,
        "stages": _sums(stages),
    }


def _sums(stages: list[list[dict[str, int]]]) -> list[dict[str, int]]:
    """What `recovery` counted, over all prompts, for each decision."""
    return [
        {name: sum(stage[name] for stage in column) for name in column[0]}
        for column in zip(*stages, strict=True)
    ]


def run(
    model: Any,
    processor: Any,
    seeds: Sequence[int],
    count: int,
    folder: Path,
    tiers: Sequence[int] = tuple(TIERS),
    recorded: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """The records of all contenders on `count` prompts of each kind and seed; those that are there are kept."""
    known = {_key(each): each for each in recorded}
    records = []
    with Progress() as progress:
        for seed in seeds:
            prompts = {kind: collect("test", seed, count, kind) for kind in (*KINDS, NEAR_MISSES)}
            everyone = contenders(model, seed, folder)
            for contender in progress.track(everyone, description=f"seed {seed}"):
                for kind in prompts:
                    held = known.get((contender.name, contender.tier, seed, kind))
                    if held or contender.tier in (None, *tiers):
                        records.append(held or record(contender, processor, prompts[kind], seed, kind))
    return records


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in ("contender", "tier", "seed", "kind"))


def _recorded(target: Path, weights: str, count: int) -> dict[str, Any]:
    """What was written for the same weights and as many prompts.

    Raises:
        ConfigError: the file has answers of others.
    """
    if not target.exists():
        return {"records": []}
    found: dict[str, Any] = json.loads(target.read_text())
    counts = {len(each["answers"]) for each in found["records"]}
    if found["weights"] != weights or counts != {count}:
        raise ConfigError(
            f"{target} has answers of weights {found['weights'][:8]} to {sorted(counts)} prompts; expected those of "
            f"{weights[:8]} to {count}. Leave out --resume to ask everyone."
        )
    return found


def _check(model: Any) -> None:
    """Raise UnsupportedModelError for models that `train.py` didn't make."""
    if model.config.model_type != "llava" or model.config.vision_config.image_size != SIDE:
        raise UnsupportedModelError(
            f"The checkpoint is a {model.config.model_type!r} model; expected a LLaVA for {SIDE} pixels, as "
            f"benchmarks/grounding/train.py writes."
        )


def main(
    checkpoint: Annotated[Path, typer.Argument(help="folder with model and processor")] = CHECKPOINT,
    folder: Annotated[Path, typer.Option(help="where results are written")] = RESULTS,
    seeds: Annotated[int, typer.Option(min=1, help="sets of scenes")] = 3,
    count: Annotated[int, typer.Option(min=1, help="prompts of each kind and set")] = 300,
    tiers: Annotated[str, typer.Option(help="with commas between")] = ",".join(map(str, TIERS)),
    resume: Annotated[
        bool, typer.Option("--resume", help="keep answers of the same weights that were written")
    ] = False,
    from_json: Annotated[
        bool, typer.Option("--from-json", help="run nothing, read what was written")
    ] = False,
) -> None:
    """Run the study, write answers and plots, print the table."""
    target = folder / "grounding.json"
    if not from_json:
        loaded = load_model(str(checkpoint), "cpu", "float32")
        _check(loaded.model)
        weights = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
        before = _recorded(target, weights, count) if resume else {"records": []}
        asked = tuple(map(int, tiers.split(",")))
        records = run(loaded.model, loaded.processor, range(seeds), count, folder, asked, before["records"])
        earlier = [*before.get("earlier", []), before["environment"]] if before["records"] else []
        here = environment(torch.device("cpu"))
        write_json(target, {"environment": here, "earlier": earlier, "weights": weights, "records": records})
    records = json.loads(target.read_text())["records"]
    plot_accuracy(records, folder / "grounding_accuracy.png")
    plot_recovery(records, folder / "grounding_recovery.png")
    print(markdown_table(records))


if __name__ == "__main__":
    typer.run(main)
