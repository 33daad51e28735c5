"""Write the checkpoint's model card: `card.md` with the scores of the study.

python benchmarks/grounding/card.py
"""

import json
import math
from pathlib import Path
from typing import Any

from evaluate import RESULTS
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open
from summary import Records, first_answers, kinds_table, score

from reroute_fx.loading.models_by_name import CHECKPOINT

FIRST = 100
"""Prompts of each kind on which everyone can check the checkpoint in a minute."""
_TEXT = Path(__file__).parent / "card.md"


def card(records: Records) -> ModelCard:
    """The card, with the unrouted model's scores on the whole test set and on its first prompts, in percent."""
    parts = {"test": records, f"first {FIRST}": first_answers(records, FIRST)}
    data = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["llava", "visual-grounding", "synthetic"],
        model_name="small-llava-scenes",
        eval_results=[
            result for part, answered in parts.items() for result in _results(part, unrouted(answered))
        ],
    )
    text = _TEXT.read_text().format(table=kinds_table(records), **_size(), **unrouted(records))
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def unrouted(records: Records) -> dict[str, float]:
    """ACC@0.5 and yes/no accuracy of the unrouted model, in percent."""
    scores = score(records, "unrouted", None)
    return {"boxes": round(100 * scores.accuracy.mean, 1), "yes_no": round(100 * scores.right.mean, 1)}


def _size() -> dict[str, Any]:
    """Million parameters, and layers of the decoder."""
    layers = json.loads((CHECKPOINT / "config.json").read_text())["text_config"]["num_hidden_layers"]
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as weights:
        count = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return {"millions": round(count / 1e6, 1), "layers": layers}


def _results(part: str, scores: dict[str, float]) -> list[EvalResult]:
    common: dict[str, Any] = {
        "task_type": "image-text-to-text",
        "dataset_type": "generated",
        "dataset_name": "scenes of reroute_fx",
        "dataset_split": part,
        "metric_type": "accuracy",
    }
    return [
        EvalResult(metric_name=name, metric_value=scores[key], **common)
        for name, key in (("ACC@0.5", "boxes"), ("yes/no accuracy", "yes_no"))
    ]


def main() -> None:
    records = json.loads((RESULTS / "grounding.json").read_text())["records"]
    card(records).save(CHECKPOINT / "README.md")


if __name__ == "__main__":
    main()
