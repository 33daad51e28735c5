"""Limits name the field, what was asked for and what is allowed."""

import pytest

from reroute_fx import ConfigError, InputError, Limits


@pytest.mark.parametrize("name", ["batch", "length", "image_tokens"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "8", None])
def test_a_limit_is_a_whole_number(name, value):
    with pytest.raises(ConfigError, match=rf"limits\.{name} is {value!r}"):
        Limits(**{name: value})


def test_a_picture_is_part_of_a_row():
    assert Limits(length=64, image_tokens=64).image_tokens == 64
    with pytest.raises(ConfigError, match=r"image_tokens is 65; expected at most limits\.length=64"):
        Limits(length=64, image_tokens=65)


def test_calls_up_to_the_limits_pass():
    limits = Limits(batch=2, length=10, image_tokens=4)
    limits.check(2, 10)
    limits.check_images([[4, 4], []])
    limits.check_images([[], []])


@pytest.mark.parametrize(
    ("batch", "length", "match"),
    [(3, 10, r"3 rows; expected at most limits\.batch=2"), (2, 11, r"11 tokens in a row.*limits\.length=10")],
)
def test_larger_calls_are_refused(batch, length, match):
    with pytest.raises(InputError, match=match):
        Limits(batch=2, length=10, image_tokens=4).check(batch, length)


def test_larger_pictures_are_refused():
    with pytest.raises(InputError, match=r"5 visual tokens in a picture.*limits\.image_tokens=4"):
        Limits(batch=2, length=10, image_tokens=4).check_images([[4], [1, 5]])
