"""What a model takes, of what a request says: pictures decoded, the conversation rendered, both preprocessed.

All of it is done in worker processes, off the thread that runs the model. A worker that dies fails the one request that
it was busy with.
"""

import asyncio
import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from typing import Any

import numpy as np
import torch

from ..errors import first_line
from ..loading.prompts import render_chat
from .bounds import Bounds
from .chat_request import ChatRequest, ImagePart
from .picture_urls import fetch_picture
from .pictures import decode_picture, read_data_url
from .refusals import RequestError, ServingError

Conversation = list[dict[str, Any]]
"""Messages as chat templates take them, pictures as ``{"type": "image"}``."""

_PLACEHOLDERS = (
    "image_token",
    "video_token",
    "boi_token",
    "eoi_token",
    "image_start_token",
    "image_end_token",
    "start_image_token",
    "end_image_token",
    "vision_start_token",
    "vision_end_token",
    "fake_image_token",
)
"""Attributes of processors that spell something which stands for pictures."""

_worker = threading.local()
"""Processor and bounds of this worker."""


def start_worker(processor: Any, bounds: Bounds) -> None:
    """Called once in each worker."""
    _worker.processor, _worker.bounds = processor, bounds
    # Workers share the cores with the model.
    torch.set_num_threads(1)
    if (parent := multiprocessing.parent_process()) is not None:
        # A server that is killed tells nobody, and its worker would wait for jobs forever.
        threading.Thread(target=_end_behind, args=(parent,), daemon=True).start()


def _end_behind(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _ready() -> None:
    """A worker's first job, with which it starts."""


def _prepare(messages: Conversation, pictures: Sequence[tuple[str, str | bytes]]) -> dict[str, np.ndarray]:
    """Inputs of a model for one row, in a worker; a picture is a data URL, or what was fetched."""
    processor, bounds = _worker.processor, _worker.bounds
    images = []
    for field, given in pictures:
        data = read_data_url(given, field, bounds) if isinstance(given, str) else given
        images.append(decode_picture(data, field, bounds))
    text = render_chat(processor, messages)
    refuse_placeholders(processor, messages, text)
    arguments = {"images": images} if images else {}
    try:
        inputs = processor(text=[text], **arguments, return_tensors="pt")
    except (ValueError, TypeError, KeyError, IndexError, ZeroDivisionError) as error:
        raise RequestError(
            "messages", f"are refused by {type(processor).__name__}: {first_line(error)}."
        ) from None
    # Arrays: torch would share memory with a process that may be gone.
    return {name: value.numpy() for name, value in inputs.items() if isinstance(value, torch.Tensor)}


def refuse_placeholders(processor: Any, messages: Conversation, text: str) -> None:
    """Raise `RequestError` if words of a message spell what stands for a picture, alone or with words beside them.

    Args:
        processor: of the model.
        messages: the conversation.
        text: as it was rendered.
    """
    names = (getattr(processor, attribute, None) for attribute in _PLACEHOLDERS)
    spelled = {name for name in names if isinstance(name, str) and name}
    for i, message in enumerate(messages):
        for k, part in enumerate(message["content"]):
            found = sorted(name for name in spelled if name in part.get("text", ""))
            if found:
                raise RequestError(
                    f"messages[{i}].content[{k}].text",
                    f"spells {found[0]!r}, which stands for a picture; expected words. Send pictures as image_url.",
                )
    without_words = [
        {
            **message,
            "content": [{**part, "text": ""} if "text" in part else part for part in message["content"]],
        }
        for message in messages
    ]
    bare = render_chat(processor, without_words)
    if any(text.count(name) != bare.count(name) for name in spelled):
        raise RequestError("messages", "together spell what stands for a picture; expected words.")


class Preparer:
    """Workers that prepare requests, each busy with one at a time.

    Args:
        make_worker: a new worker, in which `start_worker` was called.
        count: of workers.
        bounds: of what is fetched.
        fetches: whether pictures may come from http(s) URLs.
    """

    def __init__(
        self, make_worker: Callable[[], Executor], count: int, bounds: Bounds, fetches: bool = False
    ) -> None:
        self._make_worker, self._bounds, self._fetches = make_worker, bounds, fetches
        self._workers = [make_worker() for _ in range(count)]
        self._free: asyncio.Queue[Executor] = asyncio.Queue()
        for worker in self._workers:
            self._free.put_nowait(worker)

    async def prepare(self, request: ChatRequest) -> dict[str, torch.Tensor]:
        """Inputs of the model for one row, on the host.

        Raises:
            RequestError: a picture or the conversation is refused.
            ServingError: the worker died.
        """
        messages, pictures = await self._read(request)
        worker = await self._free.get()
        try:
            submitted = worker.submit(_prepare, messages, pictures)
        except BrokenExecutor:  # It died while it had nothing to do.
            worker = self._replace(worker)
            submitted = worker.submit(_prepare, messages, pictures)
        job = asyncio.wrap_future(submitted)
        # Who is no longer waited for works on: it is free when the job is done, and not before.
        job.add_done_callback(lambda done: self._give_back(worker, done))
        try:
            arrays: Mapping[str, np.ndarray] = await asyncio.shield(job)
        except BrokenExecutor:
            raise ServingError("The process that prepared the request died. Send it again.") from None
        return {name: torch.from_numpy(value) for name, value in arrays.items()}

    def _give_back(self, worker: Executor, done: "asyncio.Future[Any]") -> None:
        died = not done.cancelled() and isinstance(done.exception(), BrokenExecutor)
        self._free.put_nowait(self._replace(worker) if died else worker)

    def _replace(self, worker: Executor) -> Executor:
        worker.shutdown(wait=False)
        fresh = self._workers[self._workers.index(worker)] = self._make_worker()
        return fresh

    async def _read(self, request: ChatRequest) -> tuple[Conversation, list[tuple[str, str | bytes]]]:
        """The conversation as chat templates take it, and its pictures with the fields that they came in."""
        messages: Conversation = []
        pictures: list[tuple[str, str | bytes]] = []
        for i, message in enumerate(request.messages):
            content = []
            for k, part in enumerate(message.content):
                if isinstance(part, ImagePart):
                    field = f"messages[{i}].content[{k}].image_url.url"
                    pictures.append((field, await self._picture(part.image_url.url, field)))
                    content.append({"type": "image"})
                else:
                    content.append({"type": "text", "text": part.text})
            role = "system" if message.role == "developer" else message.role
            messages.append({"role": role, "content": content})
        return messages, pictures

    async def _picture(self, url: str, field: str) -> str | bytes:
        if not url.lower().startswith(("http:", "https:")):
            return url
        if not self._fetches:
            raise RequestError(
                field,
                "is a URL of the web, which this server doesn't fetch; expected data:image/...;base64,...",
            )
        return await fetch_picture(url, field, self._bounds)

    def wait(self) -> None:
        """Until all workers have started."""
        for worker in self._workers:
            worker.submit(_ready).result()

    def close(self) -> None:
        """End the workers, and wait for them."""
        for worker in self._workers:
            worker.shutdown(cancel_futures=True)
        # What they hold of the system goes with them: a signal may end this process before it cleans up.
        self._workers.clear()
        while not self._free.empty():
            self._free.get_nowait()


def process_worker(processor: Any, bounds: Bounds) -> Executor:
    """A worker in a process of its own, which is starting."""
    context = multiprocessing.get_context("spawn")
    worker = ProcessPoolExecutor(1, context, initializer=start_worker, initargs=(processor, bounds))
    worker.submit(_ready)
    return worker
