"""Task files for lmms-eval: the two tasks on generated scenes with their data, and the paper's by model family.

The families differ in how a box is asked for and written; with another family's prompt a model finds nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.folders import check_folder
from ..common.optional_libraries import optional_library
from ..errors import ConfigError
from ..grounding.questions import KINDS, Question, collect
from ..grounding.scenes import SIDE, Scene
from ..grounding.scoring import THRESHOLD, overlap, read_box, yes_no_scores

SHAPES_REFER, SHAPES_YES_NO = "shapes_refer", "shapes_yes_no"
GENERAL = ("pope", "gqa", "mmbench_en_dev", "mme")
_SPLITS = (
    ("refcoco", "val"),
    ("refcoco", "testA"),
    ("refcoco", "testB"),
    ("refcoco+", "val"),
    ("refcoco+", "testA"),
    ("refcoco+", "testB"),
    ("refcocog", "val"),
    ("refcocog", "test"),
)
_DATASETS = {
    "refcoco": "lmms-lab-encoder/RefCOCO",
    "refcoco+": "lmms-lab-encoder/RefCOCOplus",
    "refcocog": "lmms-lab-encoder/RefCOCOg",
}


@dataclass(frozen=True)
class BoxFormat:
    """How models of a family are asked for a box.

    Attributes:
        question, score: functions in `task_functions`; None where lmms-eval's own tasks fit, boxes in 0..1.
    """

    question: str | None = None
    score: str | None = None


FAMILIES = {
    "llava": BoxFormat(),
    "qwen2_5_vl": BoxFormat("with_box_in_json", "score_pixels"),
    "qwen3_vl": BoxFormat("with_box_in_json", "score_thousandths"),
}

_REFER = """\
task: {name}
dataset_path: {dataset}
{source}test_split: {split}
output_type: generate_until
process_docs: !function utils.refcoco_bbox_rec_preprocess_dataset
doc_to_visual: !function utils.refcoco_bbox_rec_doc_to_visual
doc_to_text: !function utils.{question}
doc_to_target: bbox
generation_kwargs: {{max_new_tokens: 64, temperature: 0, do_sample: false}}
process_results: !function utils.{score}
metric_list:
  - {{metric: refcoco_IoU, aggregation: !function utils.refcoco_bbox_rec_iou, higher_is_better: true}}
  - {{metric: refcoco_ACC@0.5, aggregation: !function utils.refcoco_bbox_rec_acc05, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
_YES_NO = """\
task: {name}
dataset_path: parquet
{source}test_split: test
output_type: generate_until
doc_to_visual: !function utils.pope_doc_to_visual
doc_to_text: !function utils.pope_doc_to_text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 16, temperature: 0, do_sample: false}}
process_results: !function utils.pope_process_results
metric_list:
  - {{metric: pope_accuracy, aggregation: !function utils.pope_aggregate_accuracy, higher_is_better: true}}
  - {{metric: pope_precision, aggregation: !function utils.pope_aggregate_precision, higher_is_better: true}}
  - {{metric: pope_recall, aggregation: !function utils.pope_aggregate_recall, higher_is_better: true}}
  - {{metric: pope_f1_score, aggregation: !function utils.pope_aggregate_f1_score, higher_is_better: true}}
lmms_eval_specific_kwargs: {{default: {{pre_prompt: "", post_prompt: ""}}}}
metadata: {{version: 1.0}}
"""


def paper_tasks(family: str) -> list[str]:
    """Names of the paper's tasks for a family: 8 of grounding, 4 of general questions."""
    check_family(family)
    own = FAMILIES[family].question is not None
    return [_name(data, split, family if own else None) for data, split in _SPLITS] + list(GENERAL)


def check_family(family: str) -> None:
    if family not in FAMILIES:
        raise ConfigError(f"family is {family!r}; expected one of {sorted(FAMILIES)}.")


def write_tasks(folder: str | Path, count: int = 200, seed: int = 0) -> list[str]:
    """Write task files and data for `lmms-eval --include_path FOLDER`.

    Args:
        folder: is made; files of the same names are replaced.
        count: prompts of each of the two tasks on generated scenes.
        seed: other seeds have other scenes.

    Returns:
        The names of the tasks.

    Raises:
        BackendUnavailableError: datasets is not installed.
        InputError: `folder` is a file.
    """
    optional_library("datasets", "eval", "to write pictures and questions")
    target = check_folder("folder", folder).absolute()
    target.mkdir(parents=True, exist_ok=True)
    (target / "utils.py").write_text("from reroute_fx.evals.task_functions import *  # noqa: F403\n")
    files = {
        SHAPES_REFER: _REFER.format(
            name=SHAPES_REFER,
            dataset="parquet",
            source=_source(target / f"{SHAPES_REFER}.parquet"),
            split="test",
            question="where_is",
            score="refcoco_bbox_rec_process_result",
        ),
        SHAPES_YES_NO: _YES_NO.format(
            name=SHAPES_YES_NO, source=_source(target / f"{SHAPES_YES_NO}.parquet")
        ),
    }
    for family, how in FAMILIES.items():
        if how.question is not None:
            for data, split in _SPLITS:
                name = _name(data, split, family)
                files[name] = _REFER.format(
                    name=name,
                    dataset=_DATASETS[data],
                    source="",
                    split=split,
                    question=how.question,
                    score=how.score,
                )
    for name, text in files.items():
        (target / f"{name}.yaml").write_text(text)
    references, checks = (collect("test", seed, count, kind) for kind in KINDS)
    _write(target / f"{SHAPES_REFER}.parquet", list(map(_refer_row, range(count), references)))
    _write(target / f"{SHAPES_YES_NO}.parquet", list(map(_yes_no_row, range(count), checks)))
    return list(files)


def shapes_scores(boxes: Sequence[str], truths: Sequence[str], seed: int = 0) -> dict[str, float]:
    """Scores of answers to the two tasks on generated scenes by our own scorer, named as lmms-eval names them.

    Args:
        boxes: answers to the referring expressions, in the order in which `write_tasks` wrote them.
        truths: answers to the yes/no questions, likewise.
        seed: that of `write_tasks`.
    """
    references = collect("test", seed, len(boxes), KINDS[0])
    checks = collect("test", seed, len(truths), KINDS[1])
    overlaps = [
        overlap(read_box(answer), question.box or ())
        for answer, (_, question) in zip(boxes, references, strict=True)
    ]
    yes_no = yes_no_scores(truths, [question.answer for _, question in checks])
    return {
        "refcoco_ACC@0.5": sum(value >= THRESHOLD for value in overlaps) / len(overlaps),
        "refcoco_IoU": sum(overlaps) / len(overlaps),
        "pope_accuracy": yes_no.accuracy,
        "pope_precision": yes_no.precision,
        "pope_recall": yes_no.recall,
        "pope_f1_score": yes_no.f1,
    }


def _name(data: str, split: str, family: str | None) -> str:
    name = f"{data}_bbox_rec_{split}"
    return name if family is None else f"{name}_{family}"


def _source(path: Path) -> str:
    return f"dataset_kwargs: {{data_files: {{test: '{path}'}}}}\n"


def _refer_row(number: int, prompt: tuple[Scene, Question]) -> dict[str, Any]:
    """As RefCOCO has them: the phrase in a list, the box as x, y, width and height in pixels."""
    here, question = prompt
    x1, y1, x2, y2 = (value * SIDE for value in question.box or ())
    phrase = question.text.removeprefix("Where is the ").removesuffix("?")
    return {
        "question_id": str(number),
        "image": here.picture,
        "answer": [phrase],
        "bbox": [x1, y1, x2 - x1, y2 - y1],
    }


def _yes_no_row(number: int, prompt: tuple[Scene, Question]) -> dict[str, Any]:
    here, question = prompt
    return {
        "question_id": str(number),
        "image": here.picture,
        "question": question.text,
        "answer": question.answer,
        "category": question.kind,
    }


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    import datasets

    temporary = path.with_suffix(".new")
    datasets.Dataset.from_list(list(rows)).to_parquet(temporary)
    temporary.replace(path)
