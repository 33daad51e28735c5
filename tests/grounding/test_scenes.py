"""Generated scenes: the same for everyone, no scene in two splits, boxes where the picture changes."""

import hashlib

import numpy as np
import pytest
from PIL import Image, ImageChops

from reroute_fx.grounding.scenes import COLOURS, SHAPES, SIDE, SIZES, SPLITS, TEXTURES, Scene, Thing, scene

COUNT = 300


def test_a_scene_is_the_same_on_every_machine():
    digest = hashlib.sha256()
    for number in range(20):
        digest.update(repr(scene("test", number)).encode())
    assert digest.hexdigest() == "43e7cc72e33b748c5ac24fa77ed98f1442dc9b3c641d6c2bb8d288789966d4fd"


def test_splits_share_no_scene():
    scenes = {split: {scene(split, n).things for n in range(COUNT)} for split in SPLITS}
    everything = [things for of_split in scenes.values() for things in of_split]
    assert len(everything) == len(SPLITS) * COUNT == len(set(everything))


def test_things_are_apart_and_inside():
    for number in range(COUNT):
        things = scene("train", number).things
        assert len(things) >= 3
        for i, thing in enumerate(things):
            low, high = SIZES[thing.size]
            assert low <= thing.side <= high
            assert all(0 < value < 1 for value in thing.box)
            for other in things[:i]:
                (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = thing.box, other.box
                assert ax2 < bx1 or bx2 < ax1 or ay2 < by1 or by2 < ay1


def test_every_word_is_used_about_as_often_as_others():
    things = [thing for number in range(COUNT) for thing in scene("train", number).things]
    for field, words in (("size", SIZES), ("texture", TEXTURES), ("colour", COLOURS), ("shape", SHAPES)):
        shares = [sum(getattr(t, field) == word for t in things) / len(things) for word in words]
        assert sum(shares) == pytest.approx(1)
        assert min(shares) > 0.5 / len(words)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_a_box_is_where_the_picture_changes(shape, size):
    """The same scene with a thing in another colour differs in the thing's box, up to its edges, and nowhere else."""
    side = sum(SIZES[size]) // 2
    one, other = (
        Scene("demo", 3, (Thing(size, "plain", colour, shape, (60, 40), side),)).picture
        for colour in ("red", "cyan")
    )
    x1, y1, x2, y2 = ImageChops.difference(one, other).getbbox()
    assert (x1, y1) == pytest.approx((60, 40), abs=1)
    assert (x2, y2) == pytest.approx((60 + side, 40 + side), abs=1)


def test_textures_and_colours_can_be_told_apart():
    def middle(texture, colour):
        picture = Scene("demo", 3, (Thing("large", texture, colour, "square", (60, 60), 44),)).picture
        return np.asarray(picture.crop((66, 66, 98, 98)), dtype=float)

    for texture in TEXTURES:
        means = [middle(texture, colour).mean((0, 1)) for colour in COLOURS]
        assert min(abs(a - b).max() for i, a in enumerate(means) for b in means[:i]) > 20
    plain, striped, dotted = (middle(texture, "red") for texture in TEXTURES)
    assert plain.std((0, 1)).max() < 12 < min(striped.std((0, 1)).max(), dotted.std((0, 1)).max())
    assert striped.mean(0).std(0).max() > 3 * striped.mean(1).std(0).max()  # stripes run from top to bottom


def test_pictures_are_rgb_and_repeat():
    one = scene("test", 5).picture
    assert (one.mode, one.size) == ("RGB", (SIDE, SIDE))
    assert isinstance(one, Image.Image)
    assert one.tobytes() == scene("test", 5).picture.tobytes()
