"""Requests become inputs in workers; one that dies fails the request that it was busy with."""

import asyncio
import os
import signal
from concurrent.futures import BrokenExecutor, Future

import pytest
import serving_models as served
import torch

from reroute_fx.serving.bounds import Bounds
from reroute_fx.serving.chat_request import ChatRequest
from reroute_fx.serving.preparing import Preparer, process_worker
from reroute_fx.serving.refusals import RequestError, ServingError


def request(text, *pictures):
    urls = [{"url": served.data_url(served.encoded(image))} for image in pictures]
    parts = [{"type": "image_url", "image_url": url} for url in urls] + [{"type": "text", "text": text}]
    return ChatRequest.model_validate({"model": "tiny", "messages": [{"role": "user", "content": parts}]})


def test_inputs_are_the_processors():
    pictures = [served.picture(1), served.picture(2, (40, 17))]
    found = asyncio.run(served.preparer().prepare(request("Is it?", *pictures)))
    expected = served.prompt("Is it?", *pictures)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("text", ["<image>", "a <image> b", "<image>" * 20])
def test_words_do_not_become_pictures(text):
    with pytest.raises(RequestError, match="spells '<image>'") as caught:
        asyncio.run(served.preparer().prepare(request(text, served.picture(1))))
    assert caught.value.field == "messages[0].content[1].text"


def test_words_that_are_nearly_a_placeholder_are_words():
    text = "<Image> <image < image> <images>"
    inputs = asyncio.run(served.preparer().prepare(request(text)))
    token = served.processor().tokenizer.convert_tokens_to_ids("<image>")
    assert (inputs["input_ids"] == token).sum() == 0


class Mortal:
    """A worker that dies of its first job, and one of those that follow in the queue before it was noticed."""

    made = 0

    def __init__(self):
        Mortal.made += 1
        self.number = Mortal.made

    def submit(self, work, *given):
        future = Future()
        if self.number == 1:
            future.set_exception(BrokenExecutor("died"))
        elif self.number == 2:
            raise BrokenExecutor("died before")
        else:
            future.set_result({})
        return future

    def shutdown(self, **_):
        pass


def test_a_worker_that_dies_fails_one_request(monkeypatch):
    monkeypatch.setattr(Mortal, "made", 0)

    async def run():
        preparer = Preparer(Mortal, 1, Bounds())
        with pytest.raises(ServingError, match="died"):
            await preparer.prepare(request("a"))
        return await preparer.prepare(request("b"))

    assert asyncio.run(run()) == {}
    assert Mortal.made == 3


@pytest.mark.full(
    "10 s: the worker is an interpreter of its own; the gate has workers that raise what a dead one does"
)
def test_a_process_that_is_killed_is_replaced():
    async def run():
        preparer = Preparer(lambda: process_worker(served.processor(), Bounds()), 1, Bounds())
        await asyncio.to_thread(preparer.wait)
        before = await preparer.prepare(request("Is it?", served.picture(1)))
        (worker,) = preparer._workers
        stopped = next(iter(worker._processes.values()))
        os.kill(stopped.pid, signal.SIGSTOP)
        waiting = asyncio.ensure_future(preparer.prepare(request("Is it?", served.picture(1))))
        await asyncio.sleep(0.1)
        os.kill(stopped.pid, signal.SIGKILL)
        with pytest.raises(ServingError, match="died"):
            await waiting
        after = await preparer.prepare(request("Is it?", served.picture(1)))
        with pytest.raises(RequestError, match="spells"):
            await preparer.prepare(request("<image>"))
        preparer.close()
        return before, after

    before, after = asyncio.run(run())
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(before["pixel_values"], served.prompt("Is it?", served.picture(1))["pixel_values"])
