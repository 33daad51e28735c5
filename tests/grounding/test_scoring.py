"""Our scores are lmms-eval's, recorded from its functions by `benchmarks/record_lmms_eval.py`."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reroute_fx.grounding.scoring import average, overlap, read_box, share, yes_no_scores

RECORDED = json.loads((Path(__file__).parent / "lmms_eval_scores.json").read_text())
boxes = st.tuples(*[st.floats(0, 1, allow_nan=False) for _ in range(4)])


@pytest.mark.parametrize("case", RECORDED["boxes"], ids=lambda case: case["answer"])
def test_boxes_are_read_and_scored_as_in_lmms_eval(case):
    box = read_box(case["answer"])
    assert list(box) == case["box"]
    assert overlap(case["truth"], box) == pytest.approx(case["overlap"], abs=1e-12)


def test_yes_and_no_are_scored_as_in_lmms_eval():
    case = RECORDED["yes_no"]
    ours = asdict(yes_no_scores(case["answers"], case["targets"]))
    for name, score in case["scores"].items():
        assert ours[name.removesuffix("_score")] == pytest.approx(score), name
    assert len(set(case["answers"])) > 4


@given(boxes, boxes)
def test_overlap_is_between_0_and_1_and_the_same_both_ways(one, other):
    one, other = ((*map(min, b[:2], b[2:]), *map(max, b[:2], b[2:])) for b in (one, other))
    assert 0 <= overlap(one, other) <= 1 + 1e-9
    assert overlap(one, other) == overlap(other, one)
    if one[0] < one[2] and one[1] < one[3] and (one[2] - one[0]) * (one[3] - one[1]) > 0:
        assert overlap(one, one) == pytest.approx(1)


def test_intervals():
    """Wilson's interval of 81 in 263 (Newcombe 1998, table I: 0.2553 to 0.3662), and a normal one."""
    found = share([True] * 81 + [False] * 182)
    assert (found.mean, found.low, found.high) == pytest.approx((0.30798, 0.2553, 0.3662), abs=5e-5)
    assert (share([True] * 20).high, share([False] * 20).low) == pytest.approx((1, 0))
    found = average([1.0, 2.0, 3.0, 4.0])
    assert (found.mean, found.high - found.mean) == pytest.approx((2.5, 1.96 * 1.2909944 / 2), abs=1e-4)
