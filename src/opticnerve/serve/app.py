"""The HTTP side: routes, every refusal in OpenAI's shape, and an answer on its way out, whole or in pieces."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from opticnerve.common.version import __version__
from opticnerve.serve.errors import ApiError, from_validation
from opticnerve.serve.limits import Metrics
from opticnerve.serve.middleware import CHAT, Middleware
from opticnerve.serve.prompts import PromptReader
from opticnerve.serve.replies import (
    AnswerMessage,
    AnswerToolCall,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ErrorResponse,
    Health,
    Logprobs,
    Model,
    ModelList,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from opticnerve.serve.scheduler import Scheduler
from opticnerve.serve.schema import ChatRequest
from opticnerve.serve.sequence import AnswerPiece, GenerationJob, PromptInputs
from opticnerve.types import OpticNerveError
from opticnerve.web.guard import Keys, Receive, Scope, Send

READERS = 2  # threads that open pictures
PATIENCE = 15.0  # seconds past a deadline after which the model's thread is taken for stuck
_REFUSED: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}}
_STREAMED = {"text/event-stream": {"schema": ChatCompletionChunk.model_json_schema()}}


def create_app(
    name: str, reader: PromptReader, scheduler: Scheduler, metrics: Metrics, keys: Keys, hosts: frozenset[str] | None
) -> Middleware:
    """The ASGI app behind its middleware.

    Args:
        name: of the model, for clients. reader, scheduler, metrics, keys: what the routes work with. hosts: as from
            `check_address`.
    """
    app = FastAPI(title="opticnerve", version=__version__, docs_url=None, redoc_url=None)
    secured = [Security(HTTPBearer(auto_error=False))] if keys else []
    middleware = Middleware(app, limits=reader.limits, keys=keys, metrics=metrics, hosts=hosts)
    pool = ThreadPoolExecutor(READERS, "reader")
    for kind in (OpticNerveError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _refuse)
    kinds = {"image": reader.processor.image_processor, "audio": reader.processor.feature_extractor}
    about = Model(
        id=name, created=int(time.time()), max_model_len=reader.context,
        modalities=["text", *(k for k, part in kinds.items() if part is not None)],
    )  # fmt: skip

    def check_name(model: str) -> None:
        if model != name:
            raise ApiError(
                404, f"there is no model {model!r} here; this server has {name!r}", param="model",
                code="model_not_found",
            )  # fmt: skip

    @app.post(
        CHAT, response_model=ChatCompletion, dependencies=secured, responses=_REFUSED | {200: {"content": _STREAMED}}
    )
    async def chat(asked: ChatRequest, request: Request) -> Any:
        """Answer a conversation. `stream: true` sends chunks as server-sent events, ended by `[DONE]`."""
        check_name(asked.model)
        prompt = await asyncio.get_running_loop().run_in_executor(pool, reader.read, asked)
        answer = ChatAnswer(asked, prompt, request, metrics, request.state.started + reader.limits.request_seconds)
        scheduler.submit(answer.job)
        answer.watch()
        try:
            await answer.begin()
            if asked.stream:
                return EventStream(answer)
            whole: Response = JSONResponse((await answer.whole()).model_dump(mode="json"))
        except Gone:
            whole = Response(status_code=499)
        except BaseException:
            answer.end()
            raise
        answer.end()
        return whole

    @app.get("/v1/models", dependencies=secured, responses=_REFUSED)
    async def models() -> ModelList:
        """The one model of this server."""
        return ModelList(data=[about])

    @app.get("/v1/models/{model:path}", dependencies=secured, responses=_REFUSED)
    async def one_model(model: str) -> Model:
        """The same, by its name."""
        check_name(model)
        return about

    @app.get("/health", responses={503: {"model": Health}})
    async def health() -> Any:
        """200 while requests are taken; 503 when the server is stopping or its model has failed."""
        status = "failed" if not scheduler.alive else "stopping" if middleware.stopping else "ok"
        found = Health(status=status, waiting=len(scheduler.waiting), running=scheduler.running)
        return JSONResponse(found.model_dump(), 200 if status == "ok" else 503)

    @app.get("/metrics", dependencies=secured, response_class=Response, responses=_REFUSED)
    async def page() -> Response:
        """For Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return middleware


async def _refuse(_: Request, e: Exception) -> JSONResponse:
    match e:
        case ApiError():
            return e.response()
        case OpticNerveError():
            return ApiError(400, str(e)).response()
        case RequestValidationError():
            return from_validation(e.errors()).response()
        case HTTPException():
            made = ApiError(e.status_code, str(e.detail)).response()
            made.headers.update(e.headers or {})
            return made
    return ApiError(500, "the server failed on this request; its log says more").response()


class Gone(Exception):
    """The client went away."""


class ChatAnswer:
    """One request's answer, heard in the event loop from the model's thread."""

    def __init__(
        self, asked: ChatRequest, prompt: PromptInputs, request: Request, metrics: Metrics, deadline: float
    ) -> None:
        self.asked, self.request, self.metrics = asked, request, metrics
        self.job = GenerationJob(asked, prompt, deadline, self._tell)
        self.loop, self.events = asyncio.get_running_loop(), asyncio.Queue[AnswerPiece | ApiError | None]()
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
        self.counts, self.finished = [0] * asked.choices, dict[int, Any]()

    def _tell(self, event: AnswerPiece | ApiError | None) -> None:
        """Called from any thread. None: the client went away."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    def watch(self) -> None:
        """Cancel the job when the client goes away."""

        async def watched() -> None:
            while (await self.request.receive())["type"] != "http.disconnect":
                pass
            self.job.gone.set()
            self._tell(None)

        self._watch = asyncio.create_task(watched())

    async def begin(self) -> None:
        """Wait for the first token: what fails before it fails with a status of its own."""
        self._first = await self._next()
        self.metrics.first_token.observe(time.monotonic() - self.request.state.started)

    async def pieces(self) -> AsyncIterator[AnswerPiece]:
        """All of them, the first included."""
        piece = self._first
        while True:
            yield piece
            if len(self.finished) == self.asked.choices:
                return
            piece = await self._next()

    async def whole(self) -> ChatCompletion:
        texts = [""] * self.asked.choices
        calls: list[list[AnswerToolCall]] = [[] for _ in texts]
        logprobs: list[list[TokenLogprob]] = [[] for _ in texts]
        async for piece in self.pieces():
            texts[piece.number] += piece.text
            logprobs[piece.number] += piece.logprobs
            calls[piece.number] += piece.calls
        choices = [
            Choice(
                index=i, finish_reason=self.finished[i],
                message=AnswerMessage(content=text or (None if calls[i] else ""), tool_calls=calls[i] or None),
                logprobs=Logprobs(content=logprobs[i]) if self.asked.likeliest is not None else None,
            )
            for i, text in enumerate(texts)
        ]  # fmt: skip
        return ChatCompletion(**self.head, choices=choices, usage=self.usage())

    def usage(self) -> Usage:
        prompt, said = len(self.job.prompt.ids), sum(self.counts)
        return Usage(prompt_tokens=prompt, completion_tokens=said, total_tokens=prompt + said)

    def end(self) -> None:
        """Whatever happened: the job's rows are free, and the log line has its numbers."""
        self.job.gone.set()
        self._watch.cancel()
        usage = self.usage()
        self.metrics.completion_tokens.inc(usage.completion_tokens)
        self.request.state.log_fields.update(
            id=self.head["id"], prompt=usage.prompt_tokens, completion=usage.completion_tokens,
            finish=",".join(str(self.finished.get(i, "gone")) for i in range(self.asked.choices)),
        )  # fmt: skip

    async def _next(self) -> AnswerPiece:
        try:
            async with asyncio.timeout(max(0.0, self.job.deadline - time.monotonic()) + PATIENCE):
                event = await self.events.get()
        except TimeoutError:
            raise ApiError(504, "the model did not answer in time") from None
        if event is None:
            raise Gone
        if isinstance(event, ApiError):
            raise event
        self.counts[event.number] = event.tokens
        if event.finish is not None:
            self.finished[event.number] = event.finish
        return event


class EventStream(Response):
    """An answer that has begun as server-sent events (`ChatCompletionChunk`), ended by `[DONE]`."""

    media_type = "text/event-stream"

    def __init__(self, answer: ChatAnswer) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.answer, options = answer, answer.asked.stream_options
        self.include_usage = options is not None and bool(options.include_usage)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def event(data: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for chunk in self._chunks():
                await event(_json(chunk))
            await event("[DONE]", more=False)
        except ApiError as e:  # too late for a status
            await event(_json(e.body), more=False)
        except (Gone, OSError):
            return
        finally:
            self.answer.end()

    async def _chunks(self) -> AsyncIterator[dict[str, Any]]:
        for i in range(self.answer.asked.choices):
            yield self._chunk(i, {"role": "assistant", "content": ""})
        async for piece in self.answer.pieces():
            if piece.text or piece.logprobs:
                logprobs = Logprobs(content=piece.logprobs) if self.answer.asked.likeliest is not None else None
                yield self._chunk(piece.number, {"content": piece.text}, logprobs)
            if piece.calls:
                called = [ToolCallDelta(index=i, **c.model_dump()).model_dump() for i, c in enumerate(piece.calls)]
                yield self._chunk(piece.number, {"tool_calls": called})
            if piece.finish is not None:
                yield self._chunk(piece.number, {}, finish=piece.finish)
        if self.include_usage:
            yield self._made([], self.answer.usage().model_dump())

    def _chunk(
        self, number: int, delta: dict[str, Any], logprobs: Logprobs | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        content = logprobs.model_dump() if logprobs is not None else None
        return self._made([{"index": number, "delta": delta, "logprobs": content, "finish_reason": finish}])

    def _made(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> dict[str, Any]:
        head = self.answer.head
        made = {"id": head["id"], "object": "chat.completion.chunk", "created": head["created"], "model": head["model"]}
        made["choices"] = choices
        return made | {"usage": usage} if self.include_usage else made


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
