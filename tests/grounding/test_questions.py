"""Questions have the answer that a reader of the scene finds, who knows nothing of how they were made."""

import re
from collections import Counter

import pytest
import torch

from reroute_fx.grounding.questions import NUMBERS, questions
from reroute_fx.grounding.scenes import COLOURS, SHAPES, SIZES, TEXTURES, scene

FIELDS = {
    word: field
    for field, words in (("size", SIZES), ("texture", TEXTURES), ("colour", COLOURS))
    for word in words
}
RELATION = re.compile(r" (left of|right of|above|below) the ")
SCENES = 250


def meant(phrase, things):
    """All things that a phrase such as "red circle above the star left of the cross" can mean."""
    parts = RELATION.split(phrase, maxsplit=1)
    fitting = [thing for thing in things if fits(thing, parts[0])]
    if len(parts) == 1:
        return fitting
    (anchor,) = meant(parts[2], things)
    return [thing for thing in fitting if thing is not anchor and lies(thing, parts[1], anchor)]


def fits(thing, words):
    *attributes, noun = words.split()
    return thing.shape == noun and all(getattr(thing, FIELDS[word]) == word for word in attributes)


def lies(thing, relation, other):
    (x, y), (u, v) = thing.centre, other.centre
    return {"left of": x < u, "right of": x > u, "above": y < v, "below": y > v}[relation]


def is_true(question, things):
    text = question.text.removesuffix("?")
    if question.kind == "exists":
        return bool(meant(text.removeprefix("Is there a "), things))
    if question.kind == "count":
        number, *words = re.sub(r"^(Is|Are) there exactly ", "", text).split()
        found = sum(any(said(thing, word) for word in words) for thing in things)
        return found == NUMBERS.index(number)
    if question.kind == "relation":
        one, relation, other = RELATION.split(text.removeprefix("Is the "))
        (a,), (b,) = meant(one, things), meant(other, things)
        return lies(a, relation, b)
    phrase, word = text.removeprefix("Is the ").rsplit(" ", 1)
    (thing,) = meant(phrase, things)
    return getattr(thing, FIELDS[word]) == word


def said(thing, word):
    singular = (
        "cross" if word == "crosses" else word.removesuffix("s") if word.removesuffix("s") in SHAPES else word
    )
    return singular in (thing.shape, thing.colour, thing.texture)


@pytest.fixture(scope="module")
def asked():
    scenes = [scene("test", number) for number in range(SCENES)]
    return [(here, *questions(here, references=5, checks=5)) for here in scenes]


def test_a_phrase_means_one_thing_and_its_box_is_the_answer(asked):
    hops = Counter()
    for here, references, _ in asked:
        for question in references:
            phrase = question.text.removeprefix("Where is the ").removesuffix("?")
            (thing,) = meant(phrase, here.things)
            assert question.box == thing.box
            assert [float(v) for v in re.findall(r"\d\.\d\d", question.answer)] == pytest.approx(
                thing.box, abs=0.0051
            )
            assert len(RELATION.findall(phrase)) == question.hops
            hops[question.hops] += 1
    assert set(hops) == {0, 1, 2}
    assert min(hops.values()) > 0.08 * hops.total()


def test_relations_are_needed(asked):
    """Without its relation the phrase means several things."""
    for here, references, _ in asked:
        for question in references:
            if question.hops:
                words = RELATION.split(question.text.removeprefix("Where is the "), maxsplit=1)[0]
                assert len([thing for thing in here.things if fits(thing, words)]) > 1


def test_yes_and_no_are_true(asked):
    kinds = Counter()
    for here, _, checks in asked:
        for question in checks:
            assert question.answer == ("yes" if is_true(question, here.things) else "no"), question.text
            kinds[question.kind, question.answer] += 1
    for kind in ("exists", "attribute", "count", "relation"):
        yes, no = kinds[kind, "yes"], kinds[kind, "no"]
        assert 0.4 < yes / (yes + no) < 0.6, kind


def test_absent_things_are_often_made_of_what_is_there(asked):
    absent = [
        (here, question.text.removeprefix("Is there a ").removesuffix("?").split())
        for here, _, checks in asked
        for question in checks
        if (question.kind, question.answer) == ("exists", "no")
    ]
    adversarial = [
        all(any(word in vars(thing).values() for thing in here.things) for word in words)
        for here, words in absent
    ]
    assert 0.5 < sum(adversarial) / len(adversarial) < 1


def test_questions_repeat_and_differ(asked):
    for here, references, checks in asked[:20]:
        assert questions(here, references=5, checks=5) == (references, checks)
        texts = [question.text for question in references + checks]
        assert len(set(texts)) == len(texts)


def test_torch_is_not_asked_for_chance():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    questions(scene("test", 0), 5, 5)
    assert torch.equal(before, torch.get_rng_state())
