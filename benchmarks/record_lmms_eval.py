"""Run lmms-eval on the two tasks of generated scenes, and record that its scores are those of our own scorer.

lmms-eval wants an environment of its own:

    python -m venv lmms && lmms/bin/pip install lmms-eval==0.7.3 && lmms/bin/pip install --no-deps .
    lmms/bin/python benchmarks/record_lmms_eval.py

writes `benchmarks/results/lmms_eval.json` (what it lists, the scores of three models, and ours on the same answers) and
`tests/grounding/lmms_eval_scores.json` (its functions on answers made by chance, which the tests compare).
"""

import json
import os
import random
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lmms_eval.models
import torch
from lmms_eval.tasks.pope import utils as pope
from lmms_eval.tasks.refcoco import utils_rec as refcoco

from reroute_fx.benchmarking.machine import environment
from reroute_fx.common.json_files import write_json
from reroute_fx.evals.tasks import SHAPES_REFER, SHAPES_YES_NO, shapes_scores, write_tasks

ROOT = Path(__file__).parents[1]
MODELS = {
    "unrouted": "method=none",
    "deleted": "method=pdrop,action=physical_delete,tier=128",
    "routed": "method=pdrop,action=compact_route_stagewise,tier=128",
}
COUNT = 200


def main() -> None:
    record = {
        "environment": environment(torch.device("cpu")),
        "lmms_eval": version("lmms-eval"),
        "listed": "reroute_fx" in lmms_eval.models.MODEL_REGISTRY_V2.list_model_names(),
        "models": {name: _evaluate(arguments) for name, arguments in MODELS.items()},
    }
    write_json(ROOT / "benchmarks" / "results" / "lmms_eval.json", record)
    write_json(ROOT / "tests" / "grounding" / "lmms_eval_scores.json", functions())


def _evaluate(arguments: str) -> dict[str, Any]:
    """Scores of lmms-eval, and ours of the answers that it logged."""
    with TemporaryDirectory() as folder:
        write_tasks(folder, COUNT)
        _run(
            *("-m", "lmms_eval", "--model", "reroute_fx"),
            *("--model_args", f"pretrained=demo,backend=eager,dtype=float32,device=cpu,{arguments}"),
            *("--tasks", f"{SHAPES_REFER},{SHAPES_YES_NO}", "--include_path", folder, "--batch_size", "20"),
            *("--log_samples", "--output_path", f"{folder}/out"),
        )
        (results,) = Path(folder).glob("out/**/*_results.json")
        scores = json.loads(results.read_text())["results"]
        answers = {task: _answers(Path(folder), task) for task in (SHAPES_REFER, SHAPES_YES_NO)}
    ours = shapes_scores(answers[SHAPES_REFER], answers[SHAPES_YES_NO])
    both = {**scores[SHAPES_REFER], **scores[SHAPES_YES_NO]}
    theirs = {name: both[f"{name},none"] for name in ours}
    return {"arguments": arguments, "answers": answers, "lmms_eval": theirs, "ours": ours}


def _answers(folder: Path, task: str) -> list[str]:
    (path,) = folder.glob(f"out/**/*_samples_{task}.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    return [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]


def _run(*arguments: str) -> str:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **offline},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def functions() -> dict[str, Any]:
    """What lmms-eval's functions say of answers made by chance."""
    chance = random.Random(0)
    boxes = []
    for _ in range(60):
        x1, y1 = chance.uniform(0, 0.6), chance.uniform(0, 0.6)
        truth = [x1, y1, x1 + chance.uniform(0.1, 0.4), y1 + chance.uniform(0.1, 0.4)]
        said = ", ".join(f"{value + chance.uniform(-0.1, 0.1):.2f}" for value in truth)
        answer = chance.choice(
            [f"[{said}]", f"It is at [ {said} ].", f"[{said}] or [0, 0, 1, 1]", f"({said})", "nowhere"]
        )
        box = refcoco.parse_float_sequence_within(answer)
        boxes.append(
            {"answer": answer, "truth": truth, "box": box, "overlap": refcoco.compute_iou(truth, box)}
        )
    words = ["yes", "no", "Yes", " no ", "yes.", "maybe", ""]
    answers = [chance.choice(words) for _ in range(80)]
    targets = [chance.choice(["yes", "no"]) for _ in answers]
    results = [
        pope.pope_process_results({"answer": target, "question_id": 0}, [answer])["pope_accuracy"]
        for answer, target in zip(answers, targets, strict=True)
    ]
    scores = {
        name: getattr(pope, f"pope_aggregate_{name}")(results)
        for name in ("accuracy", "precision", "recall", "f1_score")
    }
    return {"boxes": boxes, "yes_no": {"answers": answers, "targets": targets, "scores": scores}}


if __name__ == "__main__":
    main()
