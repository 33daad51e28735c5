"""What a request may say, and that the message names the field of what it may not."""

import json

import pytest

from reroute_fx.serving.bounds import Bounds
from reroute_fx.serving.chat_request import NEUTRAL, ImagePart, read_chat_request
from reroute_fx.serving.refusals import RequestError

TEXT = {"model": "demo", "messages": [{"role": "user", "content": "What is that?"}]}


def read(bounds=None, **fields):
    return read_chat_request(json.dumps(TEXT | fields).encode(), bounds or Bounds())


def test_a_text_is_a_message_of_one_part():
    request = read()
    (message,) = request.messages
    assert [part.text for part in message.content] == ["What is that?"]
    assert (request.n, request.stream, request.stop, request.token_limit) == (1, False, [], None)
    assert request.reroute.tier is None


def test_all_that_is_served():
    content = [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": "data:x", "detail": "auto"}},
    ]
    request = read(
        messages=[{"role": "system", "content": "b"}, {"role": "user", "content": content}],
        stream=True,
        stream_options={"include_usage": True},
        n=2,
        seed=-3,
        max_completion_tokens=7,
        temperature=0,
        top_p=0.5,
        stop="end",
        logprobs=True,
        top_logprobs=3,
        reroute={"tier": 64, "return_selection": True},
        user="me",
    )
    assert isinstance(request.messages[1].content[1], ImagePart)
    assert (request.token_limit, request.stop, request.reroute.tier) == (7, ["end"], 64)


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_is_not_served_may_be_left_neutral(name):
    for neutral in (None, *NEUTRAL[name]):
        read(**{name: neutral})
    with pytest.raises(RequestError, match=f"^{name} is not served") as caught:
        read(**{name: "something"})
    assert caught.value.field == name


def test_bounds_are_named():
    picture = {"type": "image_url", "image_url": {"url": "data:x"}}
    bounds = Bounds(answers=2, tokens=5, pictures=1, prompt_characters=20)
    for fields, message in (
        ({"n": 3}, "n is 3; expected at most 2."),
        ({"max_tokens": 6}, "max_tokens is 6; expected at most 5."),
        (
            {"messages": [{"role": "user", "content": [picture, picture]}]},
            "messages has 2 pictures; expected at most 1.",
        ),
        (
            {"messages": [{"role": "user", "content": "a" * 21}]},
            "messages has 21 characters; expected at most 20.",
        ),
    ):
        with pytest.raises(RequestError) as caught:
            read(bounds, **fields)
        assert str(caught.value) == message
