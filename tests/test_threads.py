"""Many threads on one model: each gets what it gets alone."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from artifacts import loaded_model
from conversations import MIXED, NOISE, SINGLE, TEXT, batch, build, new_tokens, prompt, routed_model
from suite_tiers import one
from test_cuda_graphs import graphed_model
from transformers import Qwen2_5_VLModel

import reroute_fx

THREADS = 8
GREEDY = {"max_new_tokens": 2, "do_sample": False}


def forward(model, inputs):
    return [model(**inputs).logits]


def forward_and_step(model, inputs):
    output = model(**inputs)
    step = torch.full_like(inputs["input_ids"][:, :1], 9)
    return [output.logits, model(input_ids=step, past_key_values=output.past_key_values).logits]


def generate(model, inputs):
    return [new_tokens(model, inputs, **GREEDY)]


def generate_beams(model, inputs):
    return [new_tokens(model, inputs, **GREEDY, num_beams=2)]


JOBS = (
    (forward_and_step, SINGLE),
    (forward_and_step, TEXT),
    (forward_and_step, MIXED),
    (forward, [prompt(6, 31, 8, 12, 14, images=2)]),
    (generate, [prompt(9, 5, 4)]),
    (generate, [*TEXT, prompt(8, 41, 3)]),
    (generate, [[1, 19, 3, 7]]),
    (generate_beams, [prompt(5, 10)]),
)
"""What the threads do at the same time, each with a prompt of its own."""


def run(family, model, job):
    ask, rows = JOBS[job]
    with torch.no_grad():
        return ask(model, batch(family, *rows))


def check_threads(family, model, rounds, alone):
    """Let threads ask `model` at the same time, and compare with what each prompt gives `alone`."""
    barrier = threading.Barrier(THREADS)

    def work(thread):
        for turn in range(rounds):
            job = (thread + turn) % len(JOBS)
            barrier.wait(timeout=120)
            try:
                torch.testing.assert_close(run(family, model, job), alone[job], atol=NOISE, rtol=0)
            except BaseException:
                barrier.abort()
                raise

    with ThreadPoolExecutor(THREADS) as pool:
        done = [pool.submit(work, thread) for thread in range(THREADS)]
    errors = [error for error in (each.exception() for each in done) if error]
    # The others only say that they wait for one that gave up.
    errors.sort(key=lambda error: isinstance(error, threading.BrokenBarrierError))
    if errors:
        raise errors[0]


def run_alone(family, model):
    return [run(family, model, job) for job in range(len(JOBS))]


@pytest.fixture(autouse=True)
def _switch_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


@one("5 s to 9 s each")
@pytest.mark.parametrize("family", ["llava", "qwen"])
@pytest.mark.parametrize(
    ("make", "rounds"),
    [(routed_model, 34), (graphed_model, 33), (loaded_model, 28)],
    ids=["routed", "graphs", "loaded"],
)
def test_eight_threads(family, make, rounds):
    model = make(family)
    check_threads(family, model, rounds, run_alone(family, model))


def test_positions_of_a_text_are_not_those_of_a_prompt_that_comes_in_between(monkeypatch):
    """Qwen2.5-VL keeps the offset of its last picture on the module and reads it in the middle of a forward."""
    model = routed_model("qwen")
    expected, second = run("qwen", model, 1)
    entered, picture_done = threading.Event(), threading.Event()
    compute = Qwen2_5_VLModel.compute_3d_position_ids

    def wait_for_the_picture(*args, **kwargs):
        is_step = kwargs["inputs_embeds"].shape[1] == 1
        if threading.current_thread() is text and is_step:
            entered.set()
            # Who waits for its turn doesn't come before this call has ended.
            picture_done.wait(timeout=1)
        return compute(*args, **kwargs)

    found = []
    text = threading.Thread(target=lambda: found.extend(run("qwen", model, 1)))
    monkeypatch.setattr(Qwen2_5_VLModel, "compute_3d_position_ids", wait_for_the_picture)
    text.start()
    assert entered.wait(timeout=60)
    with torch.no_grad():
        model(**batch("qwen", *SINGLE))
    picture_done.set()
    text.join()
    assert torch.equal(found[0], expected)
    torch.testing.assert_close(found[1], second, atol=NOISE, rtol=0)


@pytest.mark.full("45 s; the lock is the same for what is not compiled")
def test_eight_threads_on_compiled_regions():
    """The threads come before anything is compiled."""
    model = build("llava", layers=2)
    config = reroute_fx.RoutingConfig((1,), (0.5,))
    eager = reroute_fx.compile(model, config=config, backend="eager")
    compiled = reroute_fx.compile(model, config=config)
    check_threads("llava", compiled, 10, run_alone("llava", eager))


@pytest.mark.full("9 s")
def test_models_run_while_others_are_compiled():
    config = reroute_fx.RoutingConfig((1,), (0.5,))
    models = {family: routed_model(family) for family in ("llava", "qwen")}
    expected = {family: run(family, model, 0) for family, model in models.items()}
    stop = threading.Event()

    def keep_running(family):
        rounds = 0
        while not stop.is_set() or rounds == 0:
            torch.testing.assert_close(run(family, models[family], 0), expected[family], atol=NOISE, rtol=0)
            rounds += 1
        return rounds

    def compile_fresh(family):
        return reroute_fx.compile(build(family, layers=2), config=config, backend="eager")

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(keep_running, family) for family in models]
        compiling = {family: pool.submit(compile_fresh, family) for family in models}
        fresh = {family: each.result() for family, each in compiling.items()}
        stop.set()
        assert all(each.result() for each in running)
    for family, model in fresh.items():
        assert len(run(family, model, 0)) == 2
        assert model.routing_config == config
