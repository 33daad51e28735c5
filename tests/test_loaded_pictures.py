"""Models without their class take pictures and videos as the model does, and put their features where it does."""

import dataclasses

import pytest
import torch
from artifacts import without_its_class
from conversations import NOISE, expect_same_answers
from suite_tiers import share

import reroute_fx
from reroute_fx import Limits, LoadedModel, RoutingConfig
from reroute_fx.errors import InputError, UnsupportedModelError
from reroute_fx.runtime.loaded_model import _refuse_other_padding

pytestmark = pytest.mark.usefixtures("no_gradients")
RESOLUTIONS = [[16, 32], [32, 16], [32, 32]]
ROUTING = RoutingConfig((1, 2), (0.5, 0.25))
LIMITS = Limits(batch=8, length=256, image_tokens=160)
A_FAMILY = "10 s each to compile and trace; the tower alone is in test_vision_tower.py"


_made = {}


@pytest.fixture
def families(benchmark_module):
    return benchmark_module("tiny_families")


@pytest.fixture
def made(families):
    """A routed model by the name of its family, and the same without its class; each made once."""

    def make(name):
        if name not in _made:
            family = families.FAMILIES[name]
            if "image_grid_pinpoints" in family.more:
                more = {**family.more, "image_grid_pinpoints": RESOLUTIONS}
                family = dataclasses.replace(family, more=more)
            routed = reroute_fx.compile(family.build(), config=ROUTING, backend="eager")
            _made[name] = routed, without_its_class(routed, LIMITS)
        return _made[name]

    return make


def prompt(families, counts, text=(), token=None):
    """Rows of text around as many placeholders as each has, padded on the left; 0 for a row without."""
    token = token or families.IMAGE
    rows = [[1, 7 + i, *[token] * count, 9, 11, *text] for i, count in enumerate(counts)]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def expect_same(routed, loaded, inputs):
    expect_same_answers(loaded, routed, inputs, NOISE * 10, max_new_tokens=4, do_sample=False)


def tiles(routed, sizes, **more):
    torch.manual_seed(7)
    given = {
        "pixel_values": torch.randn(len(sizes), 5, 3, 16, 16),
        "image_sizes": torch.tensor(sizes),
        **more,
    }
    counts = [len(each) for each in routed.get_image_features(**given).pooler_output]
    return given, counts


@pytest.mark.parametrize("name", share(["LLaVA-NeXT", "LLaVA-OneVision"], ["LLaVA-OneVision"], A_FAMILY))
def test_tiles_of_pictures_of_any_size(name, made, families):
    routed, loaded = made(name)
    pictures, counts = tiles(routed, [[30, 9], [100, 100]])
    expect_same(routed, loaded, {**prompt(families, counts), **pictures})
    text = prompt(families, [0, sum(counts)], text=[13])
    expect_same(routed, loaded, {**text, **pictures})
    beams = {**prompt(families, counts), **pictures, "num_beams": 2, "max_new_tokens": 3}
    assert torch.equal(loaded.generate(**beams), routed.generate(**beams))


def test_pictures_that_came_together_came_whole(made, families):
    routed, loaded = made("LLaVA-OneVision")
    groups = torch.tensor([2, 1])
    pictures, counts = tiles(routed, [[30, 9], [16, 16], [9, 30]], batch_num_images=groups)
    assert counts[:2] == [17, 17]
    assert counts[2] > 17
    expect_same(routed, loaded, {**prompt(families, [34, counts[2]]), **pictures})
    with pytest.raises(InputError, match=r"batch_num_images is \[1, 1\], 2 pictures in all, .* has 3"):
        loaded(**prompt(families, [34, counts[2]]), **{**pictures, "batch_num_images": torch.tensor([1, 1])})


def test_frames_of_videos(made, families):
    routed, loaded = made("LLaVA-OneVision")
    videos = {"pixel_values_videos": torch.randn(2, 3, 3, 16, 16)}
    expect_same(routed, loaded, {**prompt(families, [13, 13], token=families.VIDEO), **videos})


NAMES = ("Video-LLaVA", "Mistral 3", "PaddleOCR-VL", "MiniMax M3 without blocks", "LFM2-VL")


@pytest.mark.parametrize("name", share(NAMES, [], A_FAMILY))
def test_beams_take_their_pictures_with_them(name, made, families):
    """Pictures under another name (``pixel_values_images``), with their sizes, as patches with grids and padded."""
    routed, loaded = made(name)
    inputs = families.prompts(routed, families.FAMILIES[name])
    expect_same(routed, loaded, inputs)
    beams = {**inputs, "num_beams": 2, "max_new_tokens": 3}
    assert torch.equal(loaded.generate(**beams), routed.generate(**beams))


def test_a_program_for_pictures_refuses_videos(made, families):
    _, loaded = made("LLaVA-OneVision")
    images = dataclasses.replace(loaded._parts.images, takes_videos=False)
    loaded = LoadedModel(dataclasses.replace(loaded._parts, images=images))
    videos = {"pixel_values_videos": torch.randn(1, 3, 3, 16, 16)}
    with pytest.raises(InputError, match=r"has videos \(pixel_values_videos\).*program for pictures only"):
        loaded(**prompt(families, [13], token=families.VIDEO), **videos)


@pytest.mark.full(A_FAMILY)
def test_what_a_model_is_told_of_each_token_is_not_lost(families, tmp_path):
    """Its experts would take all tokens for text."""
    routed = reroute_fx.compile(families.FAMILIES["Ernie 4.5 VL"].build(), config=ROUTING, backend="eager")
    with pytest.raises(UnsupportedModelError, match="takes moe_mm_token_type_ids for each token"):
        reroute_fx.export(routed, tmp_path / "artifact")


@pytest.mark.parametrize(
    ("mask", "fits"),
    [
        ([[1] * 16 + [0] * 4, [1] * 20], True),
        ([[1] * 16 + [0] * 4, [1] * 19 + [0]], False),
        ([[0] * 4 + [1] * 16, [1] * 20], False),
        ([[1] * 20], False),
    ],
)
def test_padding_stands_behind_the_patches(mask, fits):
    shapes, mask = torch.tensor([[4, 4], [4, 5]]), torch.tensor(mask)
    if fits:
        _refuse_other_padding(shapes, mask)
    else:
        with pytest.raises(InputError, match="other patches than spatial_shapes"):
            _refuse_other_padding(shapes, mask)
