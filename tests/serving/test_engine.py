"""The engine: every answer is the one that its prompt gets alone, and rows come back whatever happens."""

import functools
import time
from types import SimpleNamespace

import conversations
import numpy as np
import pytest
import serving_models as served
import torch
from artifacts import loaded_model
from suite_tiers import fewer

import reroute_fx
from reroute_fx import SlotPool
from reroute_fx.errors import ConfigError, InputError
from reroute_fx.lowering.inductor import compiled_regions
from reroute_fx.serving import engine as serving_engine
from reroute_fx.serving.answers import Piece, Started
from reroute_fx.serving.bounds import Bounds
from reroute_fx.serving.engine import Engine, Tier
from reroute_fx.serving.metrics import Metrics
from reroute_fx.serving.refusals import (
    DeadlineError,
    QueueFullError,
    RequestError,
    ServingError,
    SlowReaderError,
)
from reroute_fx.serving.sampling import Sampling, TextStream, draw

pytestmark = pytest.mark.usefixtures("one_thread")

LONGEST = 12
SAMPLINGS = {"greedy": {}, "sampled": {"temperature": 0.8, "top_p": 0.9}, "hot": {"temperature": 1.7}}


@functools.cache
def prompts():
    one, two, three = map(served.picture, range(3))
    return (
        served.prompt("What is that?", one),
        served.prompt("Which of them is red, and where?", two, three),
        served.prompt("Hello"),
    )


@functools.cache
def expected(number, tier, kind, seed):
    return served.alone(
        prompts()[number], tier, LONGEST, None if kind == "greedy" else seed, **SAMPLINGS[kind]
    )


def sampling(kind, tokens, seed=0, **options):
    options = {"temperature": 0.0} if kind == "greedy" else {**SAMPLINGS[kind], "seed": seed} | options
    return Sampling(tokens, **options)


def finish(engine):
    while engine.step():
        pass


def tokens_of(answer, number=0):
    return [part.choice.token for part in answer if isinstance(part, Piece) and part.number == number]


def is_empty(engine):
    return engine.is_idle and all(tier.pool.free == tier.pool.rows for tier in engine.tiers.values())


@fewer(gate=2, full=200, reason="each schedule takes a quarter of a second")
def test_every_answer_of_a_random_schedule_is_its_prompts_alone(rounds):
    decode, end = served.processor().tokenizer.decode, served.processor().tokenizer.eos_token_id
    engine, compared = served.engine(), 0
    for seed in range(rounds):
        random = np.random.default_rng(seed)
        sent = []
        for _ in range(int(random.integers(4, 10))):
            number, tier = int(random.integers(3)), str(random.choice(list(served.ROUTINGS)))
            kind, seed, length = (
                random.choice(list(SAMPLINGS)),
                int(random.integers(2)),
                int(random.integers(1, LONGEST)),
            )
            count = int(random.integers(1, 4))
            answer = engine.submit(prompts()[number], sampling(kind, length, seed), answers=count, tier=tier)
            sent.append((answer, number, tier, kind, seed, length, count))
            for _ in range(int(random.integers(0, 4))):
                engine.step()
            if random.random() < 0.2:
                sent[int(random.integers(len(sent)))][0].cancel()
        finish(engine)
        assert is_empty(engine)
        for answer, number, tier, kind, seed, length, count in sent:
            parts = list(answer)
            for i in range(count):
                pieces = [part for part in parts if isinstance(part, Piece) and part.number == i]
                found = [piece.choice.token for piece in pieces]
                alone = expected(number, tier, kind, seed + i)[:length]
                if answer.is_cancelled:
                    assert found == alone[: len(found)]
                    continue
                assert found == alone
                assert "".join(piece.text for piece in pieces) == decode(alone, skip_special_tokens=True)
                assert pieces[-1].finish_reason == ("stop" if alone[-1] == end else "length")
                compared += 1
    assert compared >= 5 * rounds


def test_the_prompt_comes_first_with_what_was_selected():
    engine = served.engine()
    with_picture, without = (engine.submit(prompts()[i], Sampling(1)) for i in (0, 2))
    finish(engine)
    started = next(iter(with_picture))
    assert isinstance(started, Started)
    assert started.prompt_tokens == prompts()[0]["input_ids"].shape[1]
    assert {layer: len(rows[0]) for layer, rows in started.routing.selected.items()} == {1: 8}
    assert next(iter(without)).routing is None


def test_logprobs_are_those_of_the_model_before_temperature():
    engine, (inputs, *_) = served.engine(), prompts()
    answer = engine.submit(inputs, Sampling(1, temperature=1.7, seed=3, logprobs=5))
    finish(engine)
    choice = list(answer)[1].choice
    with torch.no_grad():
        logprobs = served.models()["128"](**inputs).logits[0, -1].log_softmax(-1)
    assert choice.logprob == pytest.approx(float(logprobs[choice.token]), abs=1e-5)
    best = logprobs.topk(5)
    assert [token for token, _ in choice.alternatives] == best.indices.tolist()
    assert [value for _, value in choice.alternatives] == pytest.approx(best.values.tolist(), abs=1e-5)


@pytest.mark.parametrize("words", [7, 319, 32_064])
def test_rows_are_drawn_together_as_each_is_alone(words):
    torch.manual_seed(0)
    shares = (3 * torch.randn(5, words)).softmax(-1)
    shares[1, words // 2 :] = 0
    together, alone = ([torch.Generator().manual_seed(seed) for seed in range(5)] for _ in range(2))
    for _ in range(4):
        expected = [torch.multinomial(row, 1, generator=own) for row, own in zip(shares, alone, strict=True)]
        assert torch.equal(draw(shares, together), torch.cat(expected))


def test_rows_that_look_back_and_rows_with_logprobs_choose_beside_others(monkeypatch):
    model = served.models()["128"]
    inputs, options = prompts()[2], {"repetition_penalty": 1.3}
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 1.3)
    engine = served.engine()
    answers = [
        engine.submit(inputs, sampling("sampled", LONGEST, seed, logprobs=seed or None)) for seed in range(3)
    ]
    finish(engine)
    for seed, answer in enumerate(answers):
        pieces = [part for part in answer if isinstance(part, Piece)]
        alone = served.alone(inputs, "128", LONGEST, seed, **SAMPLINGS["sampled"], **options)
        assert [piece.choice.token for piece in pieces] == alone
        assert {len(piece.choice.alternatives) for piece in pieces} == {seed}


def test_an_answer_goes_on_behind_its_end_if_that_is_asked_for(monkeypatch):
    first = expected(0, "128", "greedy", 0)[:1]
    monkeypatch.setattr(served.models()["128"].generation_config, "eos_token_id", first)
    engine = served.engine()
    ends, goes_on = (
        engine.submit(prompts()[0], Sampling(5, temperature=0, ignores_end=on)) for on in (False, True)
    )
    finish(engine)
    assert tokens_of(ends) == first
    assert tokens_of(goes_on) == expected(0, "128", "greedy", 0)[:5]


def test_special_tokens_are_told_if_that_is_asked_for(monkeypatch):
    tokenizer = served.processor().tokenizer
    model, end = served.models()["128"], tokenizer.eos_token_id
    monkeypatch.setattr(model.generation_config, "sequence_bias", {(end,): 1000.0})
    engine = served.engine()
    asked = [
        engine.submit(prompts()[2], Sampling(3, 0.0, ignores_end=True, tells_special=on))
        for on in (False, True)
    ]
    finish(engine)
    texts = ["".join(part.text for part in answer if isinstance(part, Piece)) for answer in asked]
    assert texts == ["", 3 * tokenizer.eos_token]


def test_an_answer_ends_before_a_stop_text():
    engine, decode = served.engine(), served.processor().tokenizer.decode
    whole = decode(expected(0, "128", "greedy", 0), skip_special_tokens=True)
    stop = whole[4:6]
    first = whole.index(stop)
    answer = engine.submit(prompts()[0], Sampling(LONGEST, temperature=0, stop=("never", stop)))
    finish(engine)
    pieces = [part for part in answer if isinstance(part, Piece)]
    assert "".join(piece.text for piece in pieces) == whole[:first]
    assert pieces[-1].finish_reason == "stop"
    assert len(pieces) < LONGEST
    assert is_empty(engine)


@pytest.mark.parametrize(
    ("stops", "told", "stopped"),
    [
        ([], "a cab, über", False),
        (["cab"], "a ", True),
        (["ab, x", "b, u"], "a cab, über", False),
        (["über!"], "a cab, über", False),
        (["ü"], "a cab, ", True),
        (["r", "ca"], "a ", True),
    ],
)
def test_nothing_is_told_that_may_begin_a_stop_text(stops, told, stopped):
    # A token for each byte: the ü takes two.
    stream, texts = TextStream(lambda ids: bytes(ids).decode(errors="replace"), stops), []
    for byte in "a cab, über".encode():
        texts.append(stream.add(byte))
        assert not any(stop in "".join(texts) for stop in stops)
        if stream.stopped:
            break
    assert "".join([*texts, stream.end()]) == told
    assert stream.stopped is stopped


def test_who_leaves_frees_rows_within_a_step():
    engine = served.engine()
    gone, stays = (engine.submit(prompts()[0], Sampling(LONGEST), answers=2, tier="64") for _ in range(2))
    engine.step()
    assert engine.tiers["64"].pool.free == 1
    gone.cancel()
    engine.step()
    # Two tokens each came before, and the rows have the next ones in them.
    assert len(list(gone)) == 1 + 4
    assert engine.tiers["64"].pool.free == 1
    assert len(stays.take()[0]) == 1 + 4
    finish(engine)
    assert is_empty(engine)
    assert is_empty(engine)


def test_first_come_first_served_and_a_full_tier_stops_no_other():
    engine = served.engine()
    long, wide, small = (
        engine.submit(prompts()[2], sampling("hot", LONGEST, 1), answers=count, tier="64")
        for count in (2, 3, 1)
    )
    other = engine.submit(prompts()[2], Sampling(1), tier="128")
    engine.step()
    engine.step()
    # The small one would fit beside the first, but came after one that waits for rows.
    assert [len(answer.take()[0]) > 0 for answer in (long, wide, small, other)] == [True, False, False, True]
    finish(engine)
    assert wide.ended
    assert small.ended


def test_one_prompt_at_most_between_two_tokens():
    engine, (first, *_) = served.engine(rows=3), prompts()
    runs = []
    for tier in engine.tiers.values():
        model = tier.model
        engine.tiers[tier.name] = type(tier)(tier.name, _Counted(model, runs), tier.pool)
    slow = engine.submit(first, sampling("hot", LONGEST, 1), tier="64")
    for i in range(4):
        engine.submit(prompts()[2], Sampling(2), tier=("64", "128")[i % 2])
    between = []
    while not slow.ended:
        before = len(runs)
        engine.step()
        between.append(len(runs) - before)
        assert len([p for p in slow.take()[0] if isinstance(p, Piece)]) >= 1
    assert max(between) == 1
    assert sum(between) == 5


@pytest.fixture
def regions_engine(monkeypatch, fresh_regions):
    """With programs in regions, as the compiler gets them, which run as they are."""

    def as_it_is(region, sizes):
        return lambda *given: region(*given[len(sizes.symbols) :])

    monkeypatch.setattr(compiled_regions, "_compile_graph", as_it_is)
    model = reroute_fx.compile(served.unrouted_model(), config=served.ROUTINGS["128"], backend="inductor")
    tier = Tier("128", model, SlotPool(model, 3, served.CAPACITY))
    return Engine([tier], served.processor().tokenizer, Bounds(), Metrics())


def test_answers_grow_between_the_regions_of_a_prompt(regions_engine):
    engine, tokens = regions_engine, []
    growing = engine.submit(prompts()[0], sampling("greedy", LONGEST))
    engine.step()
    growing.take()
    for inputs in prompts()[:2]:
        # As if the last step had taken no time: there is one before the next region.
        engine._step_seconds = 0.0
        arrived = engine.submit(inputs, sampling("greedy", 3))
        engine.step()
        assert len(arrived.take()[0]) > 1
        tokens.append(tokens_of(growing.take()[0]))
    # One step comes behind a prompt.
    assert all(len(grown) > 1 for grown in tokens)
    finish(engine)
    assert tokens[0] + tokens[1] + tokens_of(growing) == expected(0, "128", "greedy", 0)[2:]


@pytest.mark.parametrize("why", ["cancelled", "late"])
def test_a_prompt_that_nobody_waits_for_stops_before_its_next_region(monkeypatch, regions_engine, why):
    engine, ran = regions_engine, []
    answer = engine.submit(prompts()[0], sampling("greedy", 3), seconds=100)

    def leave(request):
        ran.append(request)
        if why == "cancelled":
            answer.cancel()
        else:
            request.deadline = 0.0
        Engine._pause(engine, request)

    with monkeypatch.context() as patched:
        patched.setattr(engine, "_pause", leave)
        engine.step()
    assert len(ran) == 1
    assert is_empty(engine)
    if why == "late":
        with pytest.raises(DeadlineError):
            answer.take()
    again = engine.submit(prompts()[0], sampling("greedy", LONGEST))
    finish(engine)
    assert tokens_of(again) == expected(0, "128", "greedy", 0)


class _Counted:
    """A model that notes its prompts."""

    def __init__(self, model, runs):
        self.model, self.runs = model, runs

    def __call__(self, **inputs):
        self.runs.append(inputs["input_ids"].shape[1])
        return self.model(**inputs)

    def __getattr__(self, name):
        return getattr(self.model, name)


def test_a_queue_of_requests_and_bytes():
    size = sum(tensor.nbytes for tensor in prompts()[0].values())
    engine = served.engine(Bounds(queue=2))
    waiting = [engine.submit(prompts()[0], Sampling(1)) for _ in range(2)]
    with pytest.raises(QueueFullError, match=r"2 requests of .* bytes wait"):
        engine.submit(prompts()[0], Sampling(1))
    finish(engine)
    assert all(answer.ended for answer in waiting)
    engine = served.engine(Bounds(queue_bytes=size + 10))
    engine.submit(prompts()[0], Sampling(1))
    with pytest.raises(QueueFullError):
        engine.submit(prompts()[0], Sampling(1))
    finish(engine)
    engine.submit(prompts()[0], Sampling(1))


def test_a_deadline_ends_what_runs_and_what_waits():
    engine = served.engine(rows=1)
    runs, waits = (engine.submit(prompts()[0], sampling("hot", LONGEST, 1), seconds=0.2) for _ in range(2))
    engine.step()
    time.sleep(0.25)
    engine.step()
    assert is_empty(engine)
    assert isinstance(runs.take()[0][0], Started)
    for answer in (runs, waits):
        with pytest.raises(DeadlineError, match=r"not done in 0\.2 s"):
            answer.take()


def test_who_does_not_read_is_dropped():
    engine = served.engine(Bounds(unread_bytes=300))
    slow, quick = (engine.submit(prompts()[2], sampling("hot", LONGEST, 1)) for _ in range(2))
    found = []
    while engine.step():
        found += [part for part in quick.take()[0] if isinstance(part, Piece)]
    assert [piece.choice.token for piece in found] == expected(2, "128", "hot", 1)
    with pytest.raises(SlowReaderError, match="More than 300 bytes"):
        slow.take()
    assert slow.is_dropped
    assert is_empty(engine)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory; the prompt said secret"),
            ServingError,
            "not enough memory",
        ),
        (RuntimeError("the prompt said secret"), ServingError, "RuntimeError"),
        (InputError("the pictures don't fit"), InputError, "pictures don't fit"),
    ],
)
def test_a_prompt_that_fails_fails_alone(monkeypatch, caplog, error, kind, message):
    engine = served.engine()
    tier = engine.tiers["128"]
    good = engine.submit(prompts()[2], sampling("greedy", LONGEST))
    engine.step()
    write = tier.pool.write

    def fail(*_, **__):
        monkeypatch.setattr(tier.pool, "write", write)
        raise error

    monkeypatch.setattr(tier.pool, "write", fail)
    bad = engine.submit(prompts()[0], Sampling(2))
    later = engine.submit(prompts()[2], sampling("greedy", 3))
    finish(engine)
    with pytest.raises(kind, match=message) as caught:
        list(bad)
    assert "secret" not in str(caught.value) + caplog.text
    assert tokens_of(good) == expected(2, "128", "greedy", 0)
    assert tokens_of(later) == expected(2, "128", "greedy", 0)[:3]
    assert is_empty(engine)


def test_a_step_that_fails_fails_its_tier_alone(monkeypatch):
    engine = served.engine()
    bad, good = (
        engine.submit(prompts()[2], sampling("greedy", LONGEST), tier=name) for name in ("128", "64")
    )
    engine.step()
    engine.step()
    with monkeypatch.context() as patched:
        patched.setattr(engine.tiers["128"].pool, "step", lambda *_: 1 / 0)
        engine.step()
    again = engine.submit(prompts()[2], sampling("greedy", LONGEST))
    finish(engine)
    with pytest.raises(ServingError, match="ZeroDivisionError"):
        list(bad)
    assert tokens_of(good) == expected(2, "64", "greedy", 0)
    assert tokens_of(again) == expected(2, "128", "greedy", 0)
    assert is_empty(engine)


def test_a_request_that_cannot_choose_tokens_holds_no_rows(monkeypatch):
    engine = served.engine()
    with monkeypatch.context() as patched:
        patched.setattr(serving_engine, "TokenChooser", lambda *_: 1 / 0)
        bad = engine.submit(prompts()[2], Sampling(2), answers=2)
        finish(engine)
    with pytest.raises(ServingError, match="ZeroDivisionError"):
        list(bad)
    assert is_empty(engine)


def test_an_engine_whose_device_is_lost_ends_and_leaves_nobody_waiting(monkeypatch, caplog):
    def lost(*_):
        raise RuntimeError("CUDA error: the prompt said secret")

    check, gpu = (
        serving_engine._check_device,
        SimpleNamespace(model=SimpleNamespace(device=torch.device("cuda"))),
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(serving_engine, "_check_device", lambda tier: check(gpu))
    engine = served.engine()
    pool = engine.tiers["128"].pool
    # One has rows, one waits for rows, and one is of another tier.
    answers = [
        engine.submit(prompts()[2], sampling("hot", LONGEST, 1), answers=2, tier=tier)
        for tier in ("128", "128", "64")
    ]
    engine.step()
    monkeypatch.setattr(pool, "step", lost)
    monkeypatch.setattr(pool, "release", lost)
    engine.start()
    for answer in answers:
        with pytest.raises(ServingError, match=r"failed|shutting down") as caught:
            list(answer)
        assert "secret" not in str(caught.value) + caplog.text
    engine._thread.join(60)
    assert not engine.is_alive
    with pytest.raises(ServingError, match="shutting down"):
        engine.submit(prompts()[2], Sampling(1))


def test_what_can_never_run_is_refused_at_once():
    engine = served.engine()
    for options, field, message in (
        ({"tier": "7"}, "reroute.tier", "is 7; expected one of 128, 64"),
        ({"answers": 4}, "n", "is 4; expected 1 to 3"),
        ({"sampling": Sampling(served.CAPACITY)}, "max_tokens", f"at most {served.CAPACITY} together"),
    ):
        asked = {"sampling": Sampling(1), **options}
        with pytest.raises(RequestError, match=message) as caught:
            engine.submit(prompts()[2], **asked)
        assert caught.value.field == field
    assert engine.is_idle
    with pytest.raises(ConfigError, match="one or more, each once"):
        Engine([], None, Bounds(), None)


def test_a_thread_of_its_own_answers_until_it_is_closed():
    engine = served.engine()
    engine.start()
    assert engine.is_alive
    assert tokens_of(engine.submit(prompts()[2], sampling("greedy", LONGEST))) == expected(
        2, "128", "greedy", 0
    )
    engine.close()
    assert not engine.is_alive
    with pytest.raises(ServingError, match="shutting down"):
        engine.submit(prompts()[2], Sampling(1))


@pytest.mark.full("each family is captured and compiled; the gate has a LLaVA")
@pytest.mark.parametrize(("family", "loaded"), [("llava", True), ("qwen", False), ("qwen", True)])
def test_other_families_and_artifacts_answer_as_alone(family, loaded):
    model = loaded_model(family) if loaded else conversations.routed_model(family)
    tokenizer = SimpleNamespace(decode=lambda ids, **_: "".join(f"{token} " for token in ids))
    pool = SlotPool(model, 4, 100)
    engine = Engine([Tier("any", model, pool)], tokenizer, Bounds(), Metrics())
    rows = [*conversations.MIXED, *conversations.SINGLE]
    inputs = [conversations.batch(family, row) for row in rows]
    answers = []
    for given in inputs:
        answers.append(engine.submit(given, Sampling(8, temperature=0)))
        engine.step()
    finish(engine)
    assert is_empty(engine)
    for given, answer in zip(inputs, answers, strict=True):
        started, *pieces = answer
        alone = conversations.new_tokens(model, given, max_new_tokens=8, do_sample=False)[0].tolist()
        assert [piece.choice.token for piece in pieces] == alone
        pictures = (given["input_ids"] == conversations.IMAGE).sum() // 16
        assert [rows * columns for rows, columns in started.grids] == [16] * pictures
