"""The engine over HTTP, as the OpenAI client and vLLM's server have it."""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException

from ..errors import InputError, RerouteError
from .answers import Answer, Part
from .bounds import Bounds
from .chat_request import ChatRequest, read_chat_request
from .chat_responses import ChatResponse, error_body
from .engine import Engine
from .preparing import Preparer
from .refusals import BodyTooLargeError, DeadlineError, QueueFullError, RequestError
from .sampling import Sampling

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PAGE = Path(__file__).with_name("page.html")
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:; "
    "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)
"""What the page may do: ask this server."""
_KINDS = {401: "authentication_error", 429: "rate_limit_error"}
_RETRY_SECONDS = 1
_LOOK_SECONDS = 1.0
"""Between looks at whether a stream was dropped."""
_GRACE_SECONDS = 5.0
"""Behind the deadline, for a client to read that it has passed."""


@dataclass
class Service:
    """What a server serves.

    Attributes:
        name: of the model.
        engine: that answers; the app starts and closes it.
        preparer: of requests; the app closes it.
        tokenizer: of the model.
        api_key: that requests have to bring; None for requests from this machine only.
    """

    name: str
    engine: Engine
    preparer: Preparer
    tokenizer: Any
    api_key: str | None = None

    @property
    def bounds(self) -> Bounds:
        return self.engine.bounds


def make_app(service: Service) -> FastAPI:
    """The server as an ASGI application."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await asyncio.to_thread(service.engine.close)
        await asyncio.to_thread(service.preparer.close)

    app = FastAPI(title="reroute_fx", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.engine = service.engine
    chat, shown = _Chat(service), _PAGE.read_text(encoding="utf-8")

    async def check_key(request: Request) -> None:
        _check_key(request, service.api_key)

    guarded = [Depends(check_key)]

    @app.post("/v1/chat/completions", dependencies=guarded)
    async def complete(request: Request) -> Response:
        return await chat.answer(request)

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> dict[str, Any]:
        about = {"id": service.name, "object": "model", "created": chat.started, "owned_by": "reroute_fx"}
        return {"object": "list", "data": [about | {"reroute": {"tiers": list(service.engine.tiers)}}]}

    @app.get("/")
    async def page() -> Response:
        return HTMLResponse(shown, headers={"Content-Security-Policy": _POLICY})

    @app.get("/metrics", dependencies=guarded)
    async def metrics() -> Response:
        return Response(generate_latest(service.engine.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/health")
    @app.get("/ready")
    async def health() -> Response:
        return Response(status_code=200 if service.engine.is_alive else 503)

    @app.exception_handler(RerouteError)
    async def refuse(_: Request, error: RerouteError) -> Response:
        return chat.refusal(error)

    @app.exception_handler(Exception)
    async def fail(_: Request, error: Exception) -> Response:
        return JSONResponse(error_body(f"The server failed ({type(error).__name__}).", "server_error"), 500)

    @app.exception_handler(StarletteHTTPException)
    async def no_such(_: Request, error: StarletteHTTPException) -> Response:
        kind = _KINDS.get(error.status_code, "invalid_request_error")
        return JSONResponse(error_body(str(error.detail), kind), error.status_code)

    return app


def _check_key(request: Request, key: str | None) -> None:
    if key is None:
        # A page of another site may have its name point here.
        if request.url.hostname not in _LOOPBACK:
            raise HTTPException(
                403, "Host is not this machine; expected localhost, or a server with an API key."
            )
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), key.encode()):
        raise HTTPException(401, "The API key is missing or wrong; expected Authorization: Bearer KEY.")


class _Chat:
    """`/v1/chat/completions`."""

    def __init__(self, service: Service) -> None:
        self.service, self.started = service, int(time.time())
        rows = sum(tier.pool.rows for tier in service.engine.tiers.values())
        self._most_at_once, self._at_once = service.bounds.queue + rows, 0

    async def answer(self, request: Request) -> Response:
        if self._at_once >= self._most_at_once:
            raise QueueFullError(
                f"{self._at_once} requests are on their way, and no more may be. Send it later."
            )
        self._at_once += 1
        handed_on = False
        try:
            arrived = time.monotonic()
            wanted = read_chat_request(await self._body(request), self.service.bounds)
            if wanted.model != self.service.name:
                raise RequestError("model", f"is {wanted.model!r}; expected {self.service.name!r}.")
            reader = await self._submit(wanted, request, arrived)
            if wanted.stream:
                handed_on = True
                return _EventStream(
                    self._stream(reader), reader.answer, self.service.bounds.seconds, self._left
                )
            return await self._whole(reader, request)
        finally:
            if not handed_on:
                self._left()

    def _left(self) -> None:
        self._at_once -= 1

    async def _body(self, request: Request) -> bytes:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "content-type is not application/json; expected that.")
        chunks, size, most = [], 0, self.service.bounds.body_bytes
        async with _deadline(self.service.bounds.seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size > most:
                    raise BodyTooLargeError("body", f"has more than {most} bytes; expected fewer.")
                chunks.append(chunk)
        return b"".join(chunks)

    async def _submit(self, wanted: ChatRequest, request: Request, arrived: float) -> "_Reader":
        """Prepare a request, hand it to the engine, and wait until its prompt ran."""
        service, bounds = self.service, self.service.bounds
        engine = service.engine
        asked = wanted.reroute.tier
        tier = engine.tier(None if asked is None else f"{asked:g}")
        async with _deadline(bounds.seconds):
            inputs = await service.preparer.prepare(wanted)
        room = tier.pool.capacity - inputs["input_ids"].shape[1]
        sampling = Sampling(
            # A prompt without room for a token is refused by the engine.
            tokens=wanted.token_limit or max(1, min(bounds.tokens, room)),
            temperature=wanted.temperature,
            top_p=wanted.top_p,
            seed=wanted.seed,
            stop=tuple(wanted.stop),
            logprobs=(wanted.top_logprobs or 0) if wanted.logprobs else None,
            ignores_end=wanted.ignore_eos,
            tells_special=not wanted.skip_special_tokens,
        )
        left = max(0.001, bounds.seconds - (time.monotonic() - arrived))
        came = _Came()
        answer = engine.submit(
            inputs, sampling, answers=wanted.n, tier=tier.name, seconds=left, notify=came.from_thread
        )
        response = ChatResponse(wanted, service.name, tier.name, service.tokenizer)
        reader = _Reader(answer, came, response)
        try:
            await _or_gone(came.wait(), request)
            reader.first, reader.is_done = answer.take()
        except BaseException:
            answer.cancel()
            raise
        return reader

    async def _whole(self, reader: "_Reader", request: Request) -> Response:
        async def collect() -> list[Part]:
            return [part async for part in reader.parts()]

        try:
            parts = await _or_gone(collect(), request)
        finally:
            reader.answer.cancel()
        return JSONResponse(reader.response.whole(parts))

    async def _stream(self, reader: "_Reader") -> AsyncIterator[str]:
        """Server-sent events. What fails on the way is the last of them."""
        try:
            async for part in reader.parts():
                for chunk in reader.response.chunks(part):
                    yield _event(chunk)
            for chunk in reader.response.closing_chunks():
                yield _event(chunk)
            yield "data: [DONE]\n\n"
        except RerouteError as error:
            self._count(error)
            yield _event(error_body(str(error), _kind(error)))

    def refusal(self, error: RerouteError) -> Response:
        """The response to a request that was refused, or failed."""
        self._count(error)
        status = _status(error)
        headers = {"Retry-After": str(_RETRY_SECONDS)} if status == 429 else {}
        body = error_body(str(error), _kind(error), getattr(error, "field", None))
        return JSONResponse(body, status, headers=headers)

    def _count(self, error: RerouteError) -> None:
        self.service.engine.metrics.refused.labels(type(error).__name__).inc()


class _EventStream(StreamingResponse):
    """A stream that ends with its client, or while that doesn't read: when the answer is dropped, or time is up."""

    def __init__(
        self, events: AsyncIterator[str], answer: Answer, seconds: float, at_end: Callable[[], None]
    ) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._answer, self._at_end = answer, at_end
        self._end = time.monotonic() + seconds + _GRACE_SECONDS

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        sending = asyncio.ensure_future(super().__call__(scope, receive, send))
        try:
            while not (sending.done() or self._answer.is_dropped or time.monotonic() > self._end):
                await asyncio.wait([sending], timeout=_LOOK_SECONDS)
            if sending.done():
                sending.result()
        finally:
            sending.cancel()
            self._answer.cancel()
            self._at_end()


class _Came:
    """Tells a coroutine that something came, from another thread."""

    def __init__(self) -> None:
        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()

    def from_thread(self) -> None:
        with suppress(RuntimeError):  # The loop may be closed already.
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        await self._event.wait()
        self._event.clear()


@dataclass
class _Reader:
    """Reads an answer as it grows."""

    answer: Answer
    came: _Came
    response: ChatResponse
    first: list[Part] | None = None
    is_done: bool = False

    async def parts(self) -> AsyncIterator[Part]:
        for part in self.first or ():
            yield part
        while not self.is_done:
            parts, self.is_done = self.answer.take()
            for part in parts:
                yield part
            if not parts and not self.is_done:
                await self.came.wait()


async def _or_gone(work: Any, request: Request) -> Any:
    """The result of a coroutine, unless the client leaves before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise HTTPException(499, "The client left.")
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


@asynccontextmanager
async def _deadline(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise DeadlineError(f"The request was not read and prepared in {seconds:g} s.") from None


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


def _status(error: RerouteError) -> int:
    return int(getattr(error, "status", 400 if isinstance(error, InputError) else 500))


def _kind(error: RerouteError) -> str:
    status = _status(error)
    return _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
