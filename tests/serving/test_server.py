"""The running server as people use it: with the official `openai` client, and with what strangers send."""

import asyncio
import http.client
import json
import threading
import time

import numpy as np
import openai
import pytest
import serving_models as served
from PIL import Image

from reroute_fx.serving import http_app
from reroute_fx.serving.answers import Answer, Piece
from reroute_fx.serving.bounds import Bounds
from reroute_fx.serving.sampling import Choice

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 10
PICTURES = [served.picture(seed) for seed in range(2)]
URLS = [served.data_url(served.encoded(image)) for image in PICTURES]


@pytest.fixture(scope="module")
def server(one_thread):
    with served.running() as found:
        yield found
    service, _ = found
    assert all(tier.pool.free == tier.pool.rows for tier in service.engine.tiers.values())


def client_of(port, key="none"):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def client(server):
    return client_of(server[1])


def messages(text, *urls):
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


def ask(client, text="What is that?", *urls, **options):
    options = {"max_tokens": LENGTH, "temperature": 0, **options}
    return client.chat.completions.create(model="tiny", messages=messages(text, *urls), **options)


def generated(text, *pictures, tier="128", length=LENGTH, **options):
    """What `generate` answers, and its token ids."""
    ids = served.alone(served.prompt(text, *pictures), tier, length, **options)
    return served.processor().tokenizer.decode(ids, skip_special_tokens=True), ids


def wait_until_idle(service):
    end = time.monotonic() + 60
    while not service.engine.is_idle:
        assert time.monotonic() < end, "a request is left"
        time.sleep(0.01)


@pytest.mark.parametrize("count", [0, 1, 2], ids=["text", "picture", "pictures"])
def test_an_answer_is_what_generate_gives(client, count):
    response = ask(client, "What is that?", *URLS[:count])
    text, ids = generated("What is that?", *PICTURES[:count])
    (choice,) = response.choices
    assert (choice.message.content, choice.message.role) == (text, "assistant")
    assert choice.finish_reason == ("length" if len(ids) == LENGTH else "stop")
    prompt = served.prompt("What is that?", *PICTURES[:count])["input_ids"].shape[1]
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (prompt, len(ids))
    assert response.usage.total_tokens == prompt + len(ids)
    assert response.object == "chat.completion"


def test_samples_are_what_generate_draws_with_their_seeds(client):
    response = ask(client, "Is it?", URLS[0], n=3, seed=11, temperature=0.9, top_p=0.8)
    for i, choice in enumerate(response.choices):
        text, _ = generated("Is it?", PICTURES[0], seed=11 + i, temperature=0.9, top_p=0.8)
        assert (choice.index, choice.message.content) == (i, text)
    assert len({choice.message.content for choice in response.choices}) > 1


def test_a_conversation_is_rendered_by_the_models_template(client):
    turns = [
        {"role": "system", "content": "Be short."},
        *messages("What is that?", URLS[0]),
        {"role": "assistant", "content": "A circle."},
        {"role": "user", "content": "Where?"},
    ]
    response = client.chat.completions.create(model="tiny", messages=turns, max_tokens=4, temperature=0)
    rendered = "SYSTEM: Be short. USER: <image>\nWhat is that? ASSISTANT: A circle. USER: Where? ASSISTANT:"
    inputs = dict(served.processor()(text=[rendered], images=[PICTURES[0]], return_tensors="pt"))
    ids = served.alone(inputs, "128", 4)
    assert response.choices[0].message.content == served.processor().tokenizer.decode(ids)
    assert response.usage.prompt_tokens == inputs["input_ids"].shape[1]


def test_a_stream_adds_up_to_the_answer(client):
    options = {"n": 2, "seed": 4, "temperature": 1.2, "logprobs": True, "top_logprobs": 2}
    whole = ask(client, "Is it?", URLS[0], **options)
    chunks = list(
        ask(client, "Is it?", URLS[0], stream=True, stream_options={"include_usage": True}, **options)
    )
    assert {chunk.id for chunk in chunks} == {chunks[0].id} != {whole.id}
    assert chunks[-1].usage == whole.usage
    assert not chunks[-1].choices
    for choice in whole.choices:
        of_it = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert of_it[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in of_it) == choice.message.content
        assert [c.finish_reason for c in of_it if c.finish_reason] == [choice.finish_reason]
        told = [entry for c in of_it if c.logprobs for entry in c.logprobs.content]
        assert told == choice.logprobs.content
        assert all(len(entry.top_logprobs) == 2 for entry in told)
        assert [e.logprob for e in told] <= [e.top_logprobs[0].logprob for e in told]


def test_every_token_has_a_chunk_that_counts_for_who_measures(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    asked = {"ignore_eos": True, "skip_special_tokens": False}
    stream = ask(client, "Is it?", URLS[0], stream=True, stream_options=options, extra_body=asked)
    counted = [chunk.usage.completion_tokens for chunk in stream]
    assert counted == [*range(LENGTH + 1), LENGTH]


def test_an_answer_stops_before_a_text(client):
    text, _ = generated("What is that?", PICTURES[0])
    stop = text[3:5]
    response = ask(client, "What is that?", URLS[0], stop=[stop])
    assert response.choices[0].message.content == text[: text.index(stop)]
    assert response.choices[0].finish_reason == "stop"
    pieces = ask(client, "What is that?", URLS[0], stop=[stop], stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == text[: text.index(stop)]


def test_a_request_chooses_a_tier_and_is_told_what_was_kept(client):
    inputs = served.prompt("Is it?", *PICTURES)
    for tier, stream in (("64", False), ("128", True)):
        asked = {"reroute": {"tier": int(tier), "return_selection": True}}
        response = ask(client, "Is it?", *URLS, extra_body=asked, stream=stream)
        told = (next(iter(response)) if stream else response).reroute
        selected = served.models()[tier](**inputs).routing.selected
        assert told["selected"] == {str(layer): rows[0].tolist() for layer, rows in selected.items()}
        assert (told["tier"], told["visual_tokens"]) == (tier, [16, 16])
        assert told["grids"] == [[4, 4], [4, 4]]
        if not stream:
            text, _ = generated("Is it?", *PICTURES, tier=tier)
            assert response.choices[0].message.content == text
    assert not hasattr(ask(client, "Is it?"), "reroute")


@pytest.fixture
def slow(server, monkeypatch):
    """Steps take so long that no answer ends before its client has left."""
    pool = server[0].engine.tiers["128"].pool
    step = pool.step

    def wait_and_step(*given):
        time.sleep(0.02)
        return step(*given)

    monkeypatch.setattr(pool, "step", wait_and_step)


@pytest.mark.usefixtures("slow")
def test_who_leaves_a_stream_frees_the_rows(client, server):
    service, _ = server
    counter = service.engine.metrics.answered.labels("cancelled")
    before = counter._value.get()
    stream = ask(client, "What is that?", URLS[0], n=3, max_tokens=120, stream=True, seed=1, temperature=2.0)
    next(iter(stream))
    stream.close()
    wait_until_idle(service)
    assert counter._value.get() == before + 1


@pytest.mark.usefixtures("slow")
def test_who_leaves_before_an_answer_frees_the_rows(server):
    service, port = server
    counter = service.engine.metrics.answered.labels("cancelled")
    before = counter._value.get()
    connection = http.client.HTTPConnection("127.0.0.1", port)
    options = {"max_tokens": 120, "temperature": 2.0, "seed": 1, "n": 3}
    body = {"model": "tiny", "messages": messages("What is that?"), **options}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    while not any(service.engine._rows.values()):
        time.sleep(0.001)
    connection.close()
    wait_until_idle(service)
    assert counter._value.get() == before + 1


def test_many_clients_at_once_get_what_each_gets_alone(client):
    texts = ["What is that?", "Is it?", "Hello", "Where is the red one?"] * 3
    found = [None] * len(texts)

    def run(i):
        found[i] = ask(client, texts[i], URLS[i % 2], max_tokens=LENGTH).choices[0].message.content

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [generated(text, PICTURES[i % 2])[0] for i, text in enumerate(texts)]


def test_the_client_is_told_which_field_is_wrong(client):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "What is <image>?")
    assert caught.value.param == "messages[0].content[0].text"
    assert "stands for a picture" in caught.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_models_health_and_metrics(client, server):
    service, port = server
    (model,) = client.models.list().data
    assert (model.id, model.reroute) == ("tiny", {"tiers": ["128", "64"]})
    ask(client, "Is it?", URLS[0])
    assert [get(port, path)[0] for path in ("/health", "/ready")] == [200, 200]
    status, text = get(port, "/metrics")
    assert status == 200
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    bytes_of_tier = str(float(service.engine.tiers["64"].pool.bytes))
    assert float(values['reroute_fx_cache_bytes{tier="64"}']) == float(bytes_of_tier)
    assert float(values['reroute_fx_rows_in_use{tier="128"}']) == 0
    assert float(values["reroute_fx_time_to_first_token_seconds_count"]) > 0
    assert float(values['reroute_fx_kept_visual_tokens_total{layer="1",tier="128"}']) > 0


def get(port, path, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", path, headers=headers or {})
    response = connection.getresponse()
    return response.status, response.read().decode()


def test_a_key_is_asked_for_and_never_told(caplog):
    with served.running(api_key="key of the server") as (_, port):
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "key of the server"}):
            for path in ("/v1/models", "/metrics"):
                status, text = get(port, path, headers)
                assert status == 401
                assert "key of the server" not in text
        assert get(port, "/health")[0] == 200
        with pytest.raises(openai.AuthenticationError):
            ask(client_of(port))
        assert ask(client_of(port, "key of the server"), max_tokens=1).choices
    assert "key of the server" not in caplog.text


def test_a_full_server_says_when_to_come_back(monkeypatch):
    with served.running(Bounds(queue=1)) as (service, port):
        go, pool = threading.Event(), service.engine.tiers["128"].pool
        step = pool.step
        monkeypatch.setattr(pool, "step", lambda *given: go.wait(10) and step(*given))
        running_one = ask(client_of(port), n=3, stream=True)
        waiting = threading.Thread(target=ask, args=(client_of(port),))
        waiting.start()
        while not service.engine._waiting:
            time.sleep(0.001)
        with pytest.raises(openai.RateLimitError, match=r"1 requests .* wait, and no more may") as caught:
            ask(client_of(port))
        assert caught.value.response.headers["Retry-After"] == "1"
        go.set()
        assert len(list(running_one)) > 3
        waiting.join()


def test_a_deadline_is_told():
    with served.running(Bounds(seconds=0.05, tokens=150)) as (service, port):
        with pytest.raises(openai.APIStatusError, match=r"not done in 0\.\d+ s") as caught:
            ask(client_of(port), max_tokens=150, temperature=2.0, seed=1, n=3)
        assert caught.value.status_code == 504
        with pytest.raises(openai.APIError, match="not done"):
            list(ask(client_of(port), max_tokens=150, temperature=2.0, seed=1, n=3, stream=True))
        wait_until_idle(service)


@pytest.mark.parametrize("why", ["dropped", "late"])
def test_a_stream_that_is_not_read_is_let_go(monkeypatch, why):
    monkeypatch.setattr(http_app, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(http_app, "_GRACE_SECONDS", 0)
    answer, left = Answer(unread_bytes=200), []

    async def events():
        yield "data: first\n\n"

    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()  # the client's buffers are full

    async def receive():
        await asyncio.Event().wait()

    async def run():
        stream = http_app._EventStream(
            events(), answer, 0.2 if why == "late" else 1000, lambda: left.append(1)
        )
        sending = asyncio.ensure_future(stream({"type": "http", "method": "POST"}, receive, send))
        await asyncio.sleep(0.05)
        assert not sending.done()
        for _ in range(4 if why == "dropped" else 1):
            answer.put(Piece(0, Choice(1), "word"))
        await asyncio.wait_for(sending, 5)

    asyncio.run(run())
    assert answer.is_cancelled
    assert left == [1]


def test_a_page_of_another_site_is_refused(server):
    _, port = server
    assert get(port, "/v1/models", {"Host": "evil.example"})[0] == 403


def whole(**fields):
    return {"model": "tiny", "messages": [{"role": "user", "content": "Is it?"}], **fields}


def with_part(part, role="user"):
    return whole(messages=[{"role": role, "content": [part]}])


def with_url(url):
    return with_part({"type": "image_url", "image_url": {"url": url}})


def with_picture(image, format="PNG", **options):
    return with_url(served.data_url(served.encoded(image, format, **options)))


LISTENER = "http://127.0.0.1:9/"
FRAMES = {"save_all": True, "append_images": [served.picture(5)]}
HOSTILE = {
    "no json": (b"{", 400, "body is refused"),
    "no body": (b"", 400, "body is refused"),
    "bytes": (b"\xff\xfe\x00", 400, "body is refused"),
    "a list": ([], 400, "body is refused"),
    "a number": (7, 400, "body is refused"),
    "null": (None, 400, "body is refused"),
    "nested lists": (b"[" * 100_000, 400, "recursion limit"),
    "nested objects": (b'{"model":' * 20_000, 400, "recursion limit"),
    "nested metadata": (whole(metadata=json.loads('{"a":' * 150 + "1" + "}" * 150)), 400, "metadata"),
    "a large body": (whole(user="a" * 200_000), 413, "body has more than 200000 bytes"),
    "a lone surrogate": (b'{"model":"\\ud800"}', 400, "body is refused"),
    "not a number": (
        b'{"model":"tiny","temperature":NaN,"messages":[{"role":"user","content":"a"}]}',
        400,
        "temperature",
    ),
    "no model": ({"messages": whole()["messages"]}, 400, "model is refused"),
    "another model": (whole(model="gpt"), 400, "model is 'gpt'; expected 'tiny'"),
    "a path as model": (whole(model="../../etc/passwd"), 400, "expected 'tiny'"),
    "no messages": ({"model": "tiny"}, 400, "messages is refused"),
    "empty messages": (whole(messages=[]), 400, "messages is refused"),
    "many messages": (whole(messages=whole()["messages"] * 300), 400, "messages is refused"),
    "a message without content": (whole(messages=[{"role": "user"}]), 400, "messages[0].content"),
    "an object as content": (whole(messages=[{"role": "user", "content": {}}]), 400, "messages[0].content"),
    "no parts": (whole(messages=[{"role": "user", "content": []}]), 400, "messages[0].content"),
    "many parts": (
        whole(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}] * 65}]),
        400,
        "content",
    ),
    "another role": (whole(messages=[{"role": "tool", "content": "a"}]), 400, "messages[0].role"),
    "a part of no type": (with_part({"text": "a"}), 400, "messages[0].content[0]"),
    "audio": (with_part({"type": "input_audio"}), 400, "messages[0].content[0]"),
    "a number as text": (with_part({"type": "text", "text": 5}), 400, "messages[0].content[0].text"),
    "a picture of the assistant": (
        with_part({"type": "image_url", "image_url": {"url": URLS[0]}}, "assistant"),
        400,
        "messages[0] is refused: has a picture",
    ),
    "a long prompt": (whole(messages=[{"role": "user", "content": "a" * 2001}]), 400, "2001 characters"),
    "more tokens than a row holds": (
        whole(messages=[{"role": "user", "content": "a " * 500}]),
        400,
        "max_tokens is 1",
    ),
    "a placeholder": (whole(messages=[{"role": "user", "content": "<image>"}]), 400, "spells '<image>'"),
    "placeholders beside a picture": (
        whole(messages=messages("<image><image>", URLS[0])),
        400,
        "messages[0].content[1].text spells",
    ),
    "a placeholder in two parts": (
        whole(messages=[{"role": "user", "content": [{"type": "text", "text": t} for t in ("<ima", "ge>")]}]),
        400,
        "together spell",
    ),
    "an unknown field": (whole(colour="red"), 400, "colour is unknown"),
    "an unknown field of ours": (whole(reroute={"teir": 64}), 400, "reroute.teir is unknown"),
    "a tier that was not started": (
        whole(reroute={"tier": 32}),
        400,
        "reroute.tier is 32; expected one of 128, 64",
    ),
    "tools": (whole(tools=[{"type": "function"}]), 400, "tools is not served"),
    "a schema": (whole(response_format={"type": "json_object"}), 400, "response_format is not served"),
    "biased logits": (whole(logit_bias={"1": 100}), 400, "logit_bias is not served"),
    "no answer": (whole(n=0), 400, "n is refused"),
    "many answers": (whole(n=10**9), 400, "n is 1000000000; expected at most 3"),
    "half an answer": (whole(n=1.5), 400, "n is refused"),
    "true as a number": (whole(n=True), 400, "n is refused"),
    "no tokens": (whole(max_tokens=0), 400, "max_tokens is refused"),
    "many tokens": (whole(max_tokens=10**40), 400, "max_tokens"),
    "a text as a number": (whole(max_tokens="5"), 400, "max_tokens is refused"),
    "a cold temperature": (whole(temperature=-1), 400, "temperature is refused"),
    "a hot temperature": (whole(temperature=1e308), 400, "temperature is refused"),
    "top_p of nothing": (whole(top_p=0), 400, "top_p is refused"),
    "a large seed": (whole(seed=2**64), 400, "seed is refused"),
    "many stops": (whole(stop=["a"] * 1000), 400, "stop is refused"),
    "a long stop": (whole(stop="a" * 1000), 400, "stop[0] is refused"),
    "an empty stop": (whole(stop=""), 400, "stop[0] is refused"),
    "many alternatives": (whole(logprobs=True, top_logprobs=1000), 400, "top_logprobs is refused"),
    "no base64": (
        with_url("data:image/png;base64,#"),
        400,
        "messages[0].content[0].image_url.url is no base64",
    ),
    "a truncated picture": (
        with_url(served.data_url(served.encoded(PICTURES[0])[:-50])),
        400,
        "url can't be read to its end",
    ),
    "an svg": (with_url(served.data_url(b"<svg/>", "image/svg+xml")), 400, "url can't be read"),
    "16 bits": (with_picture(Image.fromarray(np.zeros((4, 4), np.uint16))), 400, "url has more than 8 bits"),
    "a bomb": (with_picture(Image.new("1", (20_000, 20_000))), 400, "url has more than 10000 pixels"),
    "many pixels": (
        with_picture(Image.new("1", (101, 100))),
        400,
        "url has 101 x 100 pixels; expected at most 10000",
    ),
    "a line": (
        with_picture(Image.new("RGB", (9999, 1))),
        400,
        "url has 9999 x 1 pixels; expected sides of at most 100",
    ),
    "frames": (with_picture(PICTURES[0], "GIF", **FRAMES), 400, "url is animated"),
    "a large picture": (
        with_url(served.data_url(bytes(70_000))),
        400,
        "url has 70002 bytes; expected at most 60000",
    ),
    "many pictures": (whole(messages=messages("a", *URLS, URLS[0])), 400, "3 pictures; expected at most 2"),
    "a file": (with_url("file:///etc/passwd"), 400, "url starts with 'file:///etc/pass'"),
    "a url of the web": (with_url(LISTENER), 400, "url is a URL of the web, which this server doesn't fetch"),
    "another address": (with_url("HTTP://169.254.169.254/latest/meta-data"), 400, "doesn't fetch"),
    "a url of no length": (with_url(""), 400, "messages[0].content[0].image_url.url is refused"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_request_is_refused_by_the_name_of_its_field(server, name):
    service, port = server
    body, status, message = HOSTILE[name]
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
    response = connection.getresponse()
    error = json.loads(response.read())["error"]
    assert (response.status, error["type"]) == (status, "invalid_request_error"), error
    assert message in error["message"]
    assert "Traceback" not in error["message"]
    assert error["param"] is None or error["message"].startswith(error["param"])
    assert service.engine.is_idle


@pytest.mark.parametrize(
    ("method", "path", "kind", "status"),
    [
        ("GET", "/v1/chat/completions", "application/json", 405),
        ("POST", "/v1/chat/completions", "text/plain", 415),
        ("POST", "/v1/completions", "application/json", 404),
        ("GET", "/../../etc/passwd", "application/json", 404),
        ("GET", "/docs", "application/json", 404),
        ("TRACE", "/v1/models", "application/json", 405),
    ],
)
def test_other_ways_in_are_closed(server, method, path, kind, status):
    connection = http.client.HTTPConnection("127.0.0.1", server[1])
    connection.request(
        method, path, json.dumps(whole()) if method == "POST" else None, {"Content-Type": kind}
    )
    response = connection.getresponse()
    assert response.status == status
    assert json.loads(response.read())["error"]["type"] == "invalid_request_error"
