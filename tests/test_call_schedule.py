"""Programs as data: they run, they survive JSON, and what is damaged is refused."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reroute_fx.common.pauses import between_regions
from reroute_fx.errors import ArtifactError
from reroute_fx.lowering.call_schedule import (
    HIDDEN,
    CallSchedule,
    RegionCall,
    ScheduledProgram,
    as_executable,
)

# Values: x 0, y 1, w 2, b 3; product 4; sum 5 and its double 6; as many threes as y is long 7.
THREES = {
    "takes": 1,
    "calls": [
        {"operator": "aten.sym_size.int", "args": [{"value": 0}, 0], "kwargs": {}},
        {"operator": "aten.full.default", "args": [[{"value": 1}], 3], "kwargs": {}},
    ],
    "returns": [{"value": 2}],
}
SCHEDULE = CallSchedule(
    inputs=("x", "y"),
    weights=("w", "b"),
    calls=(
        RegionCall(0, (0, 2), (), 1),
        RegionCall(1, (4, 3), (), 2),
        RegionCall(2, (), ((1, 0),), 1),
    ),
    outputs={HIDDEN: 5, "double": 6, "threes": 7},
    others=(THREES,),
)


def program(schedule=SCHEDULE):
    def product(values):
        x, w = values
        return [x @ w]

    def add(values):
        x, b = values
        return [x + b, 2 * (x + b)]

    weights = {"w": torch.eye(3) * 5, "b": torch.ones(3)}
    return ScheduledProgram(schedule, [product, add], weights)


def check(run):
    values = run(x=torch.tensor([[1.0, 2.0, 3.0]]), y=torch.zeros(4))
    result = as_executable(values)
    assert result["output"].last_hidden_state.tolist() == [[6, 11, 16]]
    assert {name: x.tolist() for name, x in result["routing"].items()} == {
        "double": [[12, 22, 32]],
        "threes": [3, 3, 3, 3],
    }


def test_calls_run_in_order():
    check(program())


def test_another_program_may_run_before_each_region():
    ran = []

    def run_another():
        ran.append(len(ran))
        check(program())

    with between_regions(run_another):
        check(program())
    check(program())
    assert ran == [0, 1, 2]
    with pytest.raises(ZeroDivisionError), between_regions(lambda: 1 / 0):
        check(program())
    check(program())


def test_values_are_dropped_after_their_last_use():
    assert program().released == [[0, 2], [4, 3], [1]]


def test_json_and_back():
    data = json.loads(json.dumps(SCHEDULE.to_json()))
    read = CallSchedule.from_json(data, compiled=2)
    assert read == SCHEDULE
    check(program(read))


def places(data, path=()):
    """Paths of everything inside JSON."""
    yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


DATA = json.loads(json.dumps(SCHEDULE.to_json()))
PATHS = [path for path in places(DATA) if path]
WRONG = [None, -1, 10**9, 1.5, True, "x", [], {}, [[]]]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(path=st.sampled_from(PATHS), wrong=st.sampled_from(WRONG))
def test_damage_is_refused_or_reads_only_what_is_there(path, wrong):
    data = copy.deepcopy(DATA)
    parent = data
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = wrong
    try:
        read = CallSchedule.from_json(data, compiled=2)
    except ArtifactError:
        return
    count = len(read.inputs) + len(read.weights)
    for call in read.calls:
        assert all(0 <= value < count for value in (*call.inputs, *(v for v, _ in call.lengths)))
        assert 0 <= call.region < 2 + len(read.others)
        count += call.outputs
    assert all(0 <= value < count for value in read.outputs.values())


@pytest.mark.parametrize(
    "data",
    [None, [], "schedule", {}, {**DATA, "calls": [{"region": 3, "inputs": [], "lengths": [], "outputs": 1}]}],
    ids=str,
)
def test_other_data_is_refused(data):
    with pytest.raises(ArtifactError, match="damaged"):
        CallSchedule.from_json(data, compiled=2)


def test_a_value_is_not_read_before_it_is_there():
    data = copy.deepcopy(DATA)
    data["calls"][0]["inputs"] = [0, 4]
    with pytest.raises(ArtifactError, match=r"4 is not in 0\.\.3"):
        CallSchedule.from_json(data, compiled=2)
