"""Questions about a scene: where a thing is, and whether something is true of it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from .scenes import (
    COLOURS,
    SHAPES,
    SIZES,
    TEXTURES,
    Box,
    Scene,
    Thing,
    near_misses_generator,
    questions_generator,
    scene,
)

RELATIONS = {
    "left of": (0, -1),
    "right of": (0, 1),
    "above": (1, -1),
    "below": (1, 1),
}
"""Axis and direction in which a thing lies from another."""
NUMBERS = ("zero", "one", "two", "three", "four", "five")
MOST_HOPS = 2
KINDS = ("refer", "yes/no")
NEAR_MISSES = "near misses"
"""One more kind to `collect`: yes/no questions whose words say nothing about the answer."""

_WORDS = {"size": tuple(SIZES), "texture": TEXTURES, "colour": tuple(COLOURS), "shape": SHAPES}
_MARGIN = 8
"""Pixels between centres below which no one can say which is further left."""
_TRIES = 100
_SCENES_OF_A_SEED = 100_000


@dataclass(frozen=True)
class Question:
    """What is asked about a scene.

    Attributes:
        text: as a user writes it.
        answer: as the model should; a box, or "yes" or "no".
        kind: "refer", or of a yes/no question "exists", "attribute", "count" or "relation"; of a near miss with "near "
            before it.
        box: of the thing that a "refer" question means, (x1, y1, x2, y2) in 0..1; None for others.
        hops: relations in the phrase.
    """

    text: str
    answer: str
    kind: str
    box: Box | None = None
    hops: int = 0


@dataclass(frozen=True)
class Phrase:
    """Words that mean one thing of a scene, or several."""

    text: str
    things: tuple[Thing, ...]
    hops: int = 0


def write_box(box: Sequence[float]) -> str:
    """`[x1, y1, x2, y2]` with two decimals."""
    return "[" + ", ".join(f"{value:.2f}" for value in box) + "]"


def refer(scene: Scene, random: np.random.Generator, hops: int) -> Question | None:
    """Where is the thing that a phrase with so many relations means? None if no phrase was found."""
    for _ in range(_TRIES):
        phrase = _related(scene, random, hops)
        if phrase is not None and len(phrase.things) == 1:
            box = phrase.things[0].box
            return Question(f"Where is the {phrase.text}?", write_box(box), "refer", box, hops)
    return None


def yes_no(scene: Scene, random: np.random.Generator, kind: str, truth: bool) -> Question | None:
    """A question of a kind to which the answer is known; None if no such question was found."""
    ask, hops = _ASKED[kind]
    for _ in range(_TRIES):
        text = ask(scene, random, truth)
        if text is not None:
            return Question(text, "yes" if truth else "no", kind, hops=hops)
    return None


def questions(scene: Scene, references: int, checks: int) -> tuple[list[Question], list[Question]]:
    """Up to so many questions for a box and so many for yes or no; the same for the same scene.

    Of the first, two in five have no relation, two have one, and one has two. Of the others, two in five are about
    existence; yes and no are equally likely.
    """
    random = questions_generator(scene)
    hops = random.choice(MOST_HOPS + 1, references, p=[0.4, 0.4, 0.2])
    kinds = random.choice(["exists", "attribute", "count", "relation"], checks, p=[0.4, 0.2, 0.2, 0.2])
    boxes = (refer(scene, random, int(count)) for count in hops)
    truths = (yes_no(scene, random, str(kind), bool(random.integers(2))) for kind in kinds)
    return _different(boxes), _different(truths)


def near_misses(scene: Scene, count: int) -> list[Question]:
    """Up to so many yes/no questions that only the picture can answer; the same for the same scene.

    A sentence is asked only where one as likely to be written has the other answer, so that yes and no are equally
    likely after the same words. All kinds but "near exists" have a relation: one thing must be found before what is
    asked of others can be answered.
    """
    random = near_misses_generator(scene)
    kinds = random.choice([kind for kind in _ASKED if kind.startswith("near ")], count)
    return _different(yes_no(scene, random, str(kind), bool(random.integers(2))) for kind in kinds)


def collect(split: str, seed: int, count: int, kind: str) -> list[tuple[Scene, Question]]:
    """`count` questions of a kind out of `KINDS`, or of `NEAR_MISSES`, at most two of a scene.

    Another seed has other scenes.
    """
    found: list[tuple[Scene, Question]] = []
    number = _SCENES_OF_A_SEED * seed
    while len(found) < count:
        here = scene(split, number)
        asked = near_misses(here, 2) if kind == NEAR_MISSES else questions(here, 2, 2)[KINDS.index(kind)]
        found += [(here, question) for question in asked]
        number += 1
    return found[:count]


def _different(found: Iterator[Question | None]) -> list[Question]:
    return list({question.text: question for question in found if question is not None}.values())


def _describe(scene: Scene, thing: Thing, random: np.random.Generator) -> Phrase:
    """Some of a thing's words, its shape always."""
    fields = [field for field in ("size", "texture", "colour") if random.random() < 0.45]
    return _phrase(scene, {field: getattr(thing, field) for field in [*fields, "shape"]})


def _phrase(scene: Scene, words: dict[str, str]) -> Phrase:
    fitting = (t for t in scene.things if all(getattr(t, field) == word for field, word in words.items()))
    return Phrase(" ".join(words.values()), tuple(fitting))


def _unique(scene: Scene, thing: Thing, random: np.random.Generator) -> Phrase | None:
    """As few words as mean this thing alone; a random choice of them."""
    fields = ["size", "texture", "colour"]
    for count in range(len(fields) + 1):
        chosen = list(combinations(fields, count))
        for index in random.permutation(len(chosen)):
            words = {field: getattr(thing, field) for field in [*chosen[index], "shape"]}
            phrase = _phrase(scene, words)
            if len(phrase.things) == 1:
                return phrase
    return None


def _pick(scene: Scene, random: np.random.Generator) -> Thing:
    return scene.things[random.integers(len(scene.things))]


def _related(scene: Scene, random: np.random.Generator, hops: int) -> Phrase | None:
    """A phrase for one thing, of which each relation is needed."""
    thing = _pick(scene, random)
    if hops == 0:
        phrase = _describe(scene, thing, random)
        return phrase if len(phrase.things) == 1 else _unique(scene, thing, random)
    described = _describe(scene, thing, random)
    anchor = _related(scene, random, hops - 1)
    if len(described.things) < 2 or anchor is None or anchor.things[0] == thing:
        return None
    candidates = [candidate for candidate in described.things if candidate != anchor.things[0]]
    for relation in random.permutation(list(RELATIONS)):
        sides = [_side(candidate, anchor.things[0], relation) for candidate in candidates]
        if len(candidates) > 1 and None not in sides and sum(map(bool, sides)) == 1:
            target = candidates[sides.index(True)]
            return Phrase(f"{described.text} {relation} the {anchor.text}", (target,), hops)
    return None


def _side(thing: Thing, other: Thing, relation: str) -> bool | None:
    """Whether a thing lies on this side of another; None if no one could say."""
    axis, direction = RELATIONS[relation]
    distance = (thing.centre[axis] - other.centre[axis]) * direction
    return None if abs(distance) < _MARGIN else distance > 0


def _exists(scene: Scene, random: np.random.Generator, truth: bool) -> str | None:
    if truth:
        phrase = _describe(scene, _pick(scene, random), random)
        return f"Is there a {phrase.text}?"
    phrase = _absent(scene, random)
    return None if phrase.things else f"Is there a {phrase.text}?"


def _absent(scene: Scene, random: np.random.Generator) -> Phrase:
    """A thing that is perhaps not there: any, or one of which every word is true of something that is."""
    fields = [field for field in ("size", "texture", "colour") if random.random() < 0.6] or ["colour"]
    if random.random() < 0.5:
        return _phrase(scene, {field: str(random.choice(_WORDS[field])) for field in [*fields, "shape"]})
    return _phrase(scene, {field: getattr(_pick(scene, random), field) for field in [*fields, "shape"]})


def _attribute(scene: Scene, random: np.random.Generator, truth: bool) -> str | None:
    thing = _pick(scene, random)
    phrase = _unique(scene, thing, random)
    if phrase is None:
        return None
    field = str(random.choice(["size", "texture", "colour"]))
    word = getattr(thing, field)
    if word in phrase.text.split():
        return None
    others = [other for other in _WORDS[field] if other != word]
    return f"Is the {phrase.text} {word if truth else random.choice(others)}?"


def _count(scene: Scene, random: np.random.Generator, truth: bool) -> str | None:
    field = str(random.choice(["shape", "colour", "texture"]))
    word = str(random.choice(_WORDS[field]))
    count = sum(getattr(thing, field) == word for thing in scene.things)
    said = count if truth else count + int(random.choice([-1, 1]))
    if not 0 < count <= 4 or not 1 <= said < len(NUMBERS):
        return None
    return f"{_exactly(said, word if field == 'shape' else f'{word} thing')}?"


def _exactly(number: int, noun: str) -> str:
    if number == 1:
        return f"Is there exactly one {noun}"
    return f"Are there exactly {NUMBERS[number]} {noun}{'es' if noun == 'cross' else 's'}"


def _relation(scene: Scene, random: np.random.Generator, truth: bool) -> str | None:
    one, other = (_unique(scene, _pick(scene, random), random) for _ in range(2))
    if one is None or other is None or one.things == other.things:
        return None
    relation = str(random.choice(list(RELATIONS)))
    if _side(one.things[0], other.things[0], relation) is not truth:
        return None
    return f"Is the {one.text} {relation} the {other.text}?"


def _near_exists(scene: Scene, random: np.random.Generator, truth: bool) -> str | None:
    """About a thing that is there, or one that would be if it had not one word of another."""
    here = _some_words(_pick(scene, random), random)
    field = str(random.choice(list(here)))
    absent = _phrase(scene, {**here, field: getattr(_pick(scene, random), field)})
    if absent.things:
        return None
    return f"Is there a {_phrase(scene, here).text if truth else absent.text}?"


def _near_relation(scene: Scene, random: np.random.Generator, truth: bool) -> str | None:
    """About things on this side of another, or about some on its far side that have a word in common with them."""
    here = _some_words(_pick(scene, random), random)
    far = _pick(scene, random)
    there = {field: getattr(far, field) for field in here}
    if here == there or not set(here.values()) & set(there.values()):
        return None
    anchor, relation = _pick(scene, random), str(random.choice(list(RELATIONS)))
    on_this, on_that = _phrase(scene, here), _phrase(scene, there)
    sides = [{_side(thing, anchor, relation) for thing in phrase.things} for phrase in (on_this, on_that)]
    where = _unique(scene, anchor, random) if sides == [{True}, {False}] else None
    if where is None:
        return None
    return f"Is there a {(on_this if truth else on_that).text} {relation} the {where.text}?"


def _near_attribute(scene: Scene, random: np.random.Generator, truth: bool) -> str | None:
    """About one of two things that only a relation tells apart: a word of its own, or of the other."""
    described = _describe(scene, _pick(scene, random), random)
    anchor, relation = _pick(scene, random), str(random.choice(list(RELATIONS)))
    others = [thing for thing in described.things if thing != anchor]
    both = {_side(thing, anchor, relation): thing for thing in others}
    if len(others) != 2 or set(both) != {True, False}:
        return None
    field = str(random.choice(["size", "texture", "colour"]))
    word, wrong = (getattr(both[side], field) for side in (True, False))
    where = _unique(scene, anchor, random) if word != wrong else None
    if where is None:
        return None
    return f"Is the {described.text} {relation} the {where.text} {word if truth else wrong}?"


def _near_count(scene: Scene, random: np.random.Generator, truth: bool) -> str | None:
    """About a number of things on one side of another: the right number, or one more or less than there are."""
    relation = str(random.choice(list(RELATIONS)))
    field = str(random.choice(["shape", "colour", "texture", ""]))
    said = int(random.integers(1, 4))
    counted = [each for anchor in scene.things for each in _counts(scene, anchor, relation, field)]
    right = [each for each in counted if each[0] == said]
    wrong = [each for each in counted if abs(each[0] - said) == 1]
    if not right or not wrong:
        return None
    chosen = right if truth else wrong
    _, anchor, noun = chosen[random.integers(len(chosen))]
    where = _unique(scene, anchor, random)
    return None if where is None else f"{_exactly(said, noun)} {relation} the {where.text}?"


def _counts(scene: Scene, anchor: Thing, relation: str, field: str) -> list[tuple[int, Thing, str]]:
    """How many of the others with each word of a field lie on this side of a thing; without a field, how many others.

    Of words that it has itself none is counted, and nothing if no words mean it alone.
    """
    if len(_phrase(scene, {name: getattr(anchor, name) for name in _WORDS}).things) > 1:
        return []
    own = getattr(anchor, field) if field else None
    groups: dict[str, list[Thing]] = {}
    for thing in scene.things:
        word = getattr(thing, field) if field else ""
        if word != own and thing != anchor:
            groups.setdefault(word, []).append(thing)
    found = []
    for word, things in groups.items():
        sides = [_side(thing, anchor, relation) for thing in things]
        if None not in sides:
            found.append((sides.count(True), anchor, word if field == "shape" else f"{word} thing".strip()))
    return found


def _some_words(thing: Thing, random: np.random.Generator) -> dict[str, str]:
    """A thing's shape and its texture, colour or both: all their words are as likely as each other, unlike sizes."""
    fields = (("texture", "shape"), ("colour", "shape"), ("texture", "colour", "shape"))[random.integers(3)]
    return {field: getattr(thing, field) for field in fields}


_ASKED: dict[str, tuple[Callable[[Scene, np.random.Generator, bool], str | None], int]] = {
    "exists": (_exists, 0),
    "attribute": (_attribute, 0),
    "count": (_count, 0),
    "relation": (_relation, 0),
    "near exists": (_near_exists, 0),
    "near attribute": (_near_attribute, 1),
    "near count": (_near_count, 1),
    "near relation": (_near_relation, 1),
}
"""How each kind of yes/no question is written, and the relations in its phrase beside those it asks about."""
