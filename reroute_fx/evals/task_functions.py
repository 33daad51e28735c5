"""What the tasks call: prompts and answers of grounding by model family. Scores are lmms-eval's own functions."""

from typing import Any

from lmms_eval.tasks.pope.utils import (
    pope_aggregate_accuracy,
    pope_aggregate_f1_score,
    pope_aggregate_precision,
    pope_aggregate_recall,
    pope_doc_to_text,
    pope_doc_to_visual,
    pope_process_results,
)
from lmms_eval.tasks.refcoco.utils_rec import (
    parse_float_sequence_within,
    refcoco_bbox_rec_acc05,
    refcoco_bbox_rec_doc_to_visual,
    refcoco_bbox_rec_iou,
    refcoco_bbox_rec_preprocess_dataset,
    refcoco_bbox_rec_process_result,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

__all__ = [
    "pope_aggregate_accuracy",
    "pope_aggregate_f1_score",
    "pope_aggregate_precision",
    "pope_aggregate_recall",
    "pope_doc_to_text",
    "pope_doc_to_visual",
    "pope_process_results",
    "refcoco_bbox_rec_acc05",
    "refcoco_bbox_rec_doc_to_visual",
    "refcoco_bbox_rec_iou",
    "refcoco_bbox_rec_preprocess_dataset",
    "refcoco_bbox_rec_process_result",
    "score_pixels",
    "score_thousandths",
    "where_is",
    "with_box_in_json",
]

_MIN_PIXELS, _MAX_PIXELS, _CELL = 56 * 56, 576 * 28 * 28, 28


def where_is(doc: dict[str, Any]) -> str:
    """The question that the small LLaVA of the package was trained on."""
    return f"Where is the {doc['answer']}?"


def with_box_in_json(doc: dict[str, Any]) -> str:
    """The question for Qwen's models in the paper's table (official Reroute release, `REFCOCO_PROMPT_STYLE=nuwa`)."""
    return f"Locate {doc['answer']} in this image and output the bbox coordinates in JSON format."


def score_pixels(doc: dict[str, Any], results: list[str]) -> Any:
    """Boxes in pixels of the picture as the model sees it, which has sides that are multiples of 28.

    The official release divides by the sides of the original picture, which shifts boxes by up to 2 %.
    """
    height, width = smart_resize(
        doc["image_height"], doc["image_width"], factor=_CELL, min_pixels=_MIN_PIXELS, max_pixels=_MAX_PIXELS
    )
    return _score(doc, results, width, height)


def score_thousandths(doc: dict[str, Any], results: list[str]) -> Any:
    """Boxes in thousandths of the picture's sides, as Qwen3-VL answers."""
    return _score(doc, results, 1000, 1000)


def _score(doc: dict[str, Any], results: list[str], width: float, height: float) -> Any:
    x1, y1, x2, y2 = parse_float_sequence_within(results[0])
    box = [x1 / width, y1 / height, x2 / width, y2 / height]
    return refcoco_bbox_rec_process_result(doc, ["[" + ", ".join(f"{value:.6f}" for value in box) + "]"])
