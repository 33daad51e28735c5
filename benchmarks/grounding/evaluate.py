"""The grounding study, which asks whether routing keeps what deleting loses.

    python benchmarks/grounding/evaluate.py

writes the answers of every contender to `benchmarks/results/grounding.json`, two plots beside it, and prints the table
of docs/grounding.md. `--from-json` draws and prints again without running anything.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from contenders import BATCH, Contender, contenders, make_inputs
from recovery import recovery
from rich.progress import Progress
from summary import markdown_table, plot_accuracy, plot_recovery

from reroute_fx.benchmarking.machine import environment
from reroute_fx.common.json_files import write_json
from reroute_fx.errors import UnsupportedModelError
from reroute_fx.grounding.questions import KINDS, Question, collect
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


def run(model: Any, processor: Any, seeds: Sequence[int], count: int, folder: Path) -> list[dict[str, Any]]:
    """The records of all contenders on `count` prompts of each kind and seed."""
    records = []
    with Progress() as progress:
        for seed in seeds:
            prompts = {kind: collect("test", seed, count, kind) for kind in KINDS}
            everyone = contenders(model, seed, folder)
            for contender in progress.track(everyone, description=f"seed {seed}"):
                for kind in KINDS:
                    records.append(record(contender, processor, prompts[kind], seed, kind))
    return records


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
        records = run(loaded.model, loaded.processor, range(seeds), count, folder)
        write_json(
            target, {"environment": environment(torch.device("cpu")), "weights": weights, "records": records}
        )
    records = json.loads(target.read_text())["records"]
    plot_accuracy(records, folder / "grounding_accuracy.png")
    plot_recovery(records, folder / "grounding_recovery.png")
    print(markdown_table(records))


if __name__ == "__main__":
    typer.run(main)
