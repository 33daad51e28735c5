"""Scenes: shapes of several colours, sizes and textures on clutter, and their pictures.

A scene follows from its split and number alone, so that data is never stored, and splits share no scene.
"""

import math
from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

SIDE = 168
"""Pixels of a picture's side: 12 x 12 patches of 14."""
SPLITS = ("train", "validation", "test", "demo")
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
COLOURS = {
    "red": (205, 35, 35),
    "green": (30, 140, 50),
    "blue": (35, 75, 205),
    "yellow": (230, 205, 40),
    "purple": (130, 45, 160),
    "orange": (240, 130, 25),
    "cyan": (50, 190, 205),
}
TEXTURES = ("plain", "striped", "dotted")
SIZES = {"small": (22, 28), "large": (40, 52)}
"""Pixels of an object's side."""

_FINER = 3
"""Objects are drawn this much larger and scaled down, for smooth edges."""
_GAP = 4
CROWD = (5, 9)
"""Fewest and most things in a scene; where there is no room, fewer."""

Box = tuple[float, float, float, float]
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Thing:
    """A shape in a scene.

    Attributes:
        size, texture, colour, shape: words for it.
        corner: pixels of its left and upper edge.
        side: pixels of its width, and of its height.
    """

    size: str
    texture: str
    colour: str
    shape: str
    corner: tuple[int, int]
    side: int

    @property
    def box(self) -> Box:
        """(x1, y1, x2, y2) in 0..1."""
        (x, y), side = self.corner, self.side
        return (x / SIDE, y / SIDE, (x + side) / SIDE, (y + side) / SIDE)

    @property
    def centre(self) -> tuple[float, float]:
        """Pixels."""
        return (self.corner[0] + self.side / 2, self.corner[1] + self.side / 2)


@dataclass(frozen=True)
class Scene:
    """Things that don't touch each other.

    Attributes:
        split: one of `SPLITS`.
        number: of the scene in its split.
        things: in no order.
    """

    split: str
    number: int
    things: tuple[Thing, ...]

    @property
    def picture(self) -> Image.Image:
        """RGB, `SIDE` x `SIDE`."""
        random = _generator(self.split, self.number, 1)
        image = _ground(random)
        for thing in self.things:
            _paste(image, thing, random)
        noise = random.normal(0, 6, (SIDE, SIDE, 3))
        return Image.fromarray((np.asarray(image, dtype=np.float64) + noise).clip(0, 255).astype(np.uint8))


def scene(split: str, number: int, crowd: tuple[int, int] = CROWD) -> Scene:
    """The scene of a split with this number and from so many to so many things; always the same one."""
    random = _generator(split, number, 0)
    wanted = int(random.integers(*crowd, endpoint=True))
    things: list[Thing] = []
    for _ in range(200):
        thing = _draw_lots(random, things)
        if all(_apart(thing, other) for other in things):
            things.append(thing)
        if len(things) == wanted:
            break
    return Scene(split, number, tuple(things))


def questions_generator(scene: Scene) -> np.random.Generator:
    """Randomness for what is asked about a scene."""
    return _generator(scene.split, scene.number, 2)


def near_misses_generator(scene: Scene) -> np.random.Generator:
    """Randomness for near misses, of its own so that no other question changes."""
    return _generator(scene.split, scene.number, 3)


def _generator(split: str, number: int, use: int) -> np.random.Generator:
    return np.random.default_rng([SPLITS.index(split), number, use])


def _draw_lots(random: np.random.Generator, things: list[Thing]) -> Thing:
    """A thing by chance; half of them have words of another, so that one word is seldom enough."""
    size, texture, colour, shape = (
        str(random.choice(w)) for w in (list(SIZES), TEXTURES, list(COLOURS), SHAPES)
    )
    if things and random.random() < 0.5:
        other = things[random.integers(len(things))]
        shape, colour = other.shape, other.colour if random.random() < 0.4 else colour
    side = int(random.integers(*SIZES[size], endpoint=True))
    x, y = random.integers(2, SIDE - side - 2, 2)
    return Thing(size, texture, colour, shape, (int(x), int(y)), side)


def _apart(one: Thing, other: Thing) -> bool:
    return any(
        a + one.side + _GAP <= b or b + other.side + _GAP <= a
        for a, b in zip(one.corner, other.corner, strict=True)
    )


def _ground(random: np.random.Generator) -> Image.Image:
    """Uneven light, and thin lines and specks in dull colours."""
    coarse = random.integers(-25, 25, (5, 5, 3)) + random.integers(80, 215)
    image = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize(
        (SIDE, SIDE), Image.Resampling.BICUBIC
    )
    draw = ImageDraw.Draw(image)
    for _ in range(random.integers(6, 18)):
        colour = tuple(int(c) for c in random.integers(60, 200) + random.integers(-30, 30, 3))
        x, y, dx, dy = (int(v) for v in (*random.integers(0, SIDE, 2), *random.integers(-30, 30, 2)))
        if random.random() < 0.6:
            draw.line((x, y, x + dx, y + dy), fill=colour, width=int(random.integers(1, 3)))
        else:
            draw.ellipse((x, y, x + 4, y + 4), fill=colour)
    return image


def _paste(image: Image.Image, thing: Thing, random: np.random.Generator) -> None:
    """Draw a thing where it belongs."""
    side = thing.side * _FINER
    mask = Image.new("L", (side, side))
    _draw_shape(ImageDraw.Draw(mask), thing.shape, side - 1)
    tint = random.integers(-14, 15, 3)
    base = tuple(int(c) for c in (np.array(COLOURS[thing.colour]) + tint).clip(0, 255))
    filled = _texture(thing.texture, side, (base[0], base[1], base[2]))
    smooth = (thing.side, thing.side)
    image.paste(
        filled.resize(smooth, Image.Resampling.BOX), thing.corner, mask.resize(smooth, Image.Resampling.BOX)
    )


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, end: int) -> None:
    """Fill a shape that touches 0 and `end` on both axes."""
    if shape == "circle":
        draw.ellipse((0, 0, end, end), fill=255)
    elif shape == "square":
        draw.rectangle((0, 0, end, end), fill=255)
    elif shape == "cross":
        arm = end * 0.32
        draw.rectangle((arm, 0, end - arm, end), fill=255)
        draw.rectangle((0, arm, end, end - arm), fill=255)
    else:
        draw.polygon([(x * end, y * end) for x, y in _corners(shape)], fill=255)


def _corners(shape: str) -> list[tuple[float, float]]:
    """Corners in 0..1."""
    if shape == "triangle":
        return [(0.5, 0), (1, 1), (0, 1)]
    if shape == "diamond":
        return [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)]
    turns = [math.pi * i / 5 for i in range(10)]
    radii = [1 if i % 2 == 0 else 0.42 for i in range(10)]
    points = [(r * math.sin(t), -r * math.cos(t)) for r, t in zip(radii, turns, strict=True)]
    low_x, low_y = (min(p[i] for p in points) for i in range(2))
    high_x, high_y = (max(p[i] for p in points) for i in range(2))
    return [((x - low_x) / (high_x - low_x), (y - low_y) / (high_y - low_y)) for x, y in points]


def _texture(texture: str, side: int, colour: Colour) -> Image.Image:
    image = Image.new("RGB", (side, side), colour)
    draw = ImageDraw.Draw(image)
    dark = tuple(c * 2 // 5 for c in colour)
    step = 8 * _FINER
    if texture == "striped":
        for x in range(0, side, step):
            draw.rectangle((x, 0, x + step * 3 // 8, side), fill=dark)
    elif texture == "dotted":
        for x, y in product(range(step // 3, side, step), repeat=2):
            draw.ellipse((x, y, x + step // 2, y + step // 2), fill=dark)
    return image
