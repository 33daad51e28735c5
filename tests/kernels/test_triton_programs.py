"""With how many programs the kernels are launched: a GPU has about a hundred processors, and batch 1 is one row."""

import pytest
import torch
from kernel_examples import scoring_inputs, selection_inputs

from reroute_fx.kernels.select_tokens import triton as selecting
from reroute_fx.kernels.visual_scores import triton as scoring


@pytest.fixture
def launched(monkeypatch):
    """The programs of each kernel by its name; none of them runs."""
    programs = {}

    class Recorder:
        def __init__(self, kernel):
            self.name = kernel.__name__

        def __getitem__(self, grid):
            programs[self.name] = grid
            return lambda *args, **options: None

    for module in (selecting, scoring):
        monkeypatch.setattr(module, "wrap_triton", Recorder)
    return programs


@pytest.mark.parametrize(
    ("visual", "ranking", "averaging"), [(576, 18, 36), (2304, 72, 144), (4096, 128, 256)]
)
def test_one_row_is_shared_by_many_programs(launched, visual, ranking, averaging):
    kept, length = visual // 4, visual + 40
    inputs = selection_inputs([(length, [(visual, visual, kept)])])
    selecting.select_tokens_triton(*inputs)
    scoring.visual_scores_triton(*scoring_inputs(32, 32, length, 8, (length,), (visual,)))
    assert launched["_rank"] == (ranking, 1)
    assert launched["_place"] == (-(-(kept + 40) // selecting.BLOCK_SLOTS), 1)
    assert launched["_mean_over_heads"] == (averaging, 1)


def test_rows_have_programs_of_their_own(launched):
    selecting.select_tokens_triton(*selection_inputs([(100, [(63, 63, 7)])] * 5))
    assert {grid[1] for grid in launched.values()} == {5}


def test_without_visual_tokens_nothing_is_ranked(launched):
    empty = torch.zeros(2, 0)
    inputs = empty, empty.long(), torch.tensor([5, 9]), empty.bool(), None, 10, 9
    selecting.select_tokens_triton(*inputs)
    assert launched == {"_rank": (0, 2), "_place": (1, 2)}
