"""Rotary positions without the model's code are those of the model."""

import pytest
import torch
from conversations import IMAGE, VIDEO, unrouted_model
from hypothesis import given, settings
from hypothesis import strategies as st
from suite_tiers import one

from reroute_fx.capture.positions import GridPositions, find_positions
from reroute_fx.errors import InputError, UnsupportedModelError

TEXT = st.integers(1, 6).map(lambda count: ("text", count))
IMAGES = st.tuples(st.just(1), st.integers(1, 5), st.integers(1, 5)).map(lambda grid: ("image", grid))
VIDEOS = st.tuples(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.sampled_from([0.25, 1.0, 1.7])
).map(lambda clip: ("video", clip))


@st.composite
def rows(draw):
    """Text and pictures by turns, as a chat template writes them."""
    parts = [draw(TEXT)]
    for _ in range(draw(st.integers(0, 3))):
        parts += [draw(IMAGES | VIDEOS), draw(TEXT)]
    return parts


def collect(batch, pad, apart=False):
    """Ids, mask, grids and seconds of rows, padded on one side; `apart` has text between the frames of a video."""
    ids, images, videos, seconds = [], [], [], []
    for row in batch:
        ids.append([])
        for kind, what in row:
            if kind == "text":
                ids[-1] += [5] * what
            else:
                time, height, width = what[:3]
                frame = [IMAGE if kind == "image" else VIDEO] * (height * width)
                ids[-1] += ([*frame, 6] if apart else frame) * time
                (images if kind == "image" else videos).append([time, 2 * height, 2 * width])
                seconds += [what[3]] if kind == "video" else []
    longest = max(map(len, ids))
    fill = [[0] * (longest - len(row)) for row in ids]
    mask = [[1] * len(row) for row in ids]
    side = 1 if pad == "right" else -1
    padded = [torch.tensor([*a, *b]) for a, b in (pair[::side] for pair in zip(ids, fill, strict=True))]
    masked = [torch.tensor([*a, *b]) for a, b in (pair[::side] for pair in zip(mask, fill, strict=True))]
    return torch.stack(padded), torch.stack(masked), images, videos, seconds


@one("2 s each")
@given(batch=st.lists(rows(), min_size=1, max_size=3), pad=st.sampled_from(["left", "right"]))
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("family", ["qwen", "qwen3"])
def test_they_are_those_of_the_model(family, batch, pad):
    model = unrouted_model(family)
    ids, mask, images, videos, seconds = collect(batch, pad, apart=family == "qwen3")
    of_each = ((IMAGE, images), (VIDEO, videos))
    grids = {token: torch.tensor(found, dtype=torch.int64).view(-1, 3) for token, found in of_each}
    expected, _ = model.model.get_rope_index(
        ids,
        mm_token_type_ids=(ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
        image_grid_thw=grids[IMAGE],
        video_grid_thw=grids[VIDEO],
        second_per_grid_ts=torch.tensor(seconds),
        attention_mask=mask,
    )
    found = find_positions(model, 3)(ids, mask.bool(), grids, VIDEO, torch.tensor(seconds))
    assert torch.equal(found, expected)


def test_neighbouring_pictures_have_a_place_each():
    """Without text in between the second starts behind the longer edge of the first."""
    positions = GridPositions(merge=2, tokens_per_second=None)
    ids = torch.tensor([[5, *[IMAGE] * 2, *[IMAGE] * 6]])
    grids = {IMAGE: torch.tensor([[1, 2, 4], [1, 4, 6]])}
    found = positions(ids, torch.ones_like(ids).bool(), grids)
    assert found[:, 0].tolist() == [
        [0, 1, 1, 3, 3, 3, 3, 3, 3],
        [0, 1, 1, 3, 3, 3, 4, 4, 4],
        [0, 1, 2, 3, 4, 5, 3, 4, 5],
    ]


def test_seconds_as_early_versions_count_them(monkeypatch):
    """In transformers 5.17 the seconds between frames are cut to whole ones first."""
    model = unrouted_model("qwen")
    original = model.model.get_rope_index

    def cut(*args, second_per_grid_ts, **kwargs):
        return original(*args, second_per_grid_ts=second_per_grid_ts.int(), **kwargs)

    monkeypatch.setattr(model.model, "get_rope_index", cut)
    positions = find_positions(model, 3)
    assert positions.whole_seconds
    ids = torch.tensor([[5, *[VIDEO] * 3]])
    grids = {VIDEO: torch.tensor([[3, 2, 2]])}
    found = positions(ids, torch.ones_like(ids).bool(), grids, VIDEO, torch.tensor([1.7]))
    assert found[0, 0].tolist() == [0, 1, 5, 9]


def test_models_that_count_tokens_need_none():
    assert find_positions(unrouted_model("llava"), 2) is None


def test_a_model_that_counts_in_another_way_is_refused(monkeypatch):
    model = unrouted_model("qwen")
    original = model.model.get_rope_index

    def shifted(*args, **kwargs):
        positions, offsets = original(*args, **kwargs)
        return positions + 1, offsets

    def asks_for_sound(input_ids, audio_lengths):
        raise AssertionError("it is not called without")

    for other in (shifted, asks_for_sound):
        monkeypatch.setattr(model.model, "get_rope_index", other)
        with pytest.raises(UnsupportedModelError, match="other rotary positions"):
            find_positions(model, 3)


def test_what_follows_a_video_may_start_behind_its_frames():
    """Three frames of 2 x 1 tokens, two positions apart."""
    ids, grids = torch.tensor([[5, *[VIDEO] * 6, 5]]), {VIDEO: torch.tensor([[3, 4, 2]])}
    is_token, seconds = torch.ones_like(ids).bool(), torch.tensor([2.0])
    for behind_all, last in ((True, 6), (False, 3)):
        positions = GridPositions(2, 1.0, behind_all=behind_all)(ids, is_token, grids, VIDEO, seconds)
        assert positions[:, 0].tolist() == [
            [0, 1, 1, 3, 3, 5, 5, last],
            [0, 1, 2, 1, 2, 1, 2, last],
            [0, 1, 1, 1, 1, 1, 1, last],
        ]
    exact = GridPositions(2, 1.0, whole=False)
    assert torch.equal(exact(ids, is_token, grids, VIDEO, seconds)[0, 0, 3:5], torch.tensor([3, 3]))
    with pytest.raises(InputError, match=r"1\.25 s apart.*expected a whole number of positions"):
        exact(ids, is_token, grids, VIDEO, torch.tensor([1.25]))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen2.5-Omni", {"tokens_per_second": 25, "behind_all": True}),
        ("Qwen3-Omni", {"tokens_per_second": 25, "behind_all": True, "whole": False}),
        ("GLM-4.1V", {"tokens_per_second": None, "single_frames": True}),
    ],
)
def test_families_count_as_their_code_does(benchmark_module, name, expected):
    model = benchmark_module("tiny_families").FAMILIES[name].build()
    assert find_positions(model, 3) == GridPositions(2, **expected)
