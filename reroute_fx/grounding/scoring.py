"""Scores of answers: boxes as RefCOCO's are scored, yes and no as POPE's are.

The rules are those of lmms-eval 0.7.3 (`tasks/refcoco/utils_rec.py`, `tasks/pope/utils.py`), so that numbers compare;
they need none of its packages.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .scenes import Box

THRESHOLD = 0.5
"""Least overlap of a box that counts as found."""
_NO_BOX: Box = (0.0, 0.0, 0.0, 0.0)
_BOX = re.compile(r"\[\s*(-?\d+(?:\.\d+)?(?:,\s*-?\d+(?:\.\d+)?){3})\s*\]")
_NORMAL_95 = 1.959963984540054


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class YesNoScores:
    """POPE's scores; "yes" is the positive answer."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float


def read_box(answer: str) -> Box:
    """The first ``[x1, y1, x2, y2]`` in an answer; zeros if there is none."""
    found = _BOX.search(answer)
    if found is None:
        return _NO_BOX
    x1, y1, x2, y2 = map(float, found[1].split(","))
    return (x1, y1, x2, y2)


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes ``(x1, y1, x2, y2)``."""
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    shared = width * height
    union = _area(one) + _area(other) - shared
    return shared / union if union > 0 else 0.0


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def yes_no_scores(answers: Sequence[str], targets: Sequence[str]) -> YesNoScores:
    """Scores of answers that are right if they are the target, but for case and space around.

    For recall, answers that are neither count on no side.
    """
    said = [answer.strip().lower() for answer in answers]
    pairs = list(zip(said, targets, strict=True))
    both = sum(a == t == "yes" for a, t in pairs)
    yes, missed = said.count("yes"), pairs.count(("no", "yes"))
    precision = both / yes if yes else 0.0
    recall = both / (both + missed) if both else 0.0
    return YesNoScores(
        accuracy=sum(a == t for a, t in pairs) / len(pairs),
        precision=precision,
        recall=recall,
        f1=2 * precision * recall / (precision + recall) if both else 0.0,
        yes_ratio=yes / len(pairs),
    )


def share(hits: Sequence[bool]) -> Interval:
    """The share of hits with Wilson's interval."""
    count, z = len(hits), _NORMAL_95
    mean = sum(hits) / count
    centre = (mean + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return Interval(mean, min(mean, centre - half), max(mean, centre + half))


def average(values: Sequence[float]) -> Interval:
    """The mean with the interval of a normal distribution."""
    count = len(values)
    mean = sum(values) / count
    variance = sum((value - mean) ** 2 for value in values) / max(1, count - 1)
    half = _NORMAL_95 * math.sqrt(variance / count)
    return Interval(mean, mean - half, mean + half)
