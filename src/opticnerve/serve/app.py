"""The HTTP side: routes, and every refusal in OpenAI's shape."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from opticnerve.common.version import __version__
from opticnerve.serve.auth import Keys
from opticnerve.serve.errors import ApiError, from_validation
from opticnerve.serve.metrics import Metrics
from opticnerve.serve.middleware import CHAT, Middleware
from opticnerve.serve.prompts import Reader
from opticnerve.serve.sampling import Wishes
from opticnerve.serve.scheduler import Scheduler
from opticnerve.serve.schema import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatRequest,
    ErrorResponse,
    Health,
    Model,
    ModelList,
)
from opticnerve.serve.sequence import Job
from opticnerve.serve.stream import Answer, EventStream, Gone, Listener
from opticnerve.types import OpticNerveError

READERS = 2  # threads that open pictures
_REFUSED: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}}
_STREAMED = {"text/event-stream": {"schema": ChatCompletionChunk.model_json_schema()}}


def create_app(
    *, name: str, reader: Reader, scheduler: Scheduler, metrics: Metrics, keys: Keys, only_host: str | None = None
) -> Middleware:
    """The ASGI app, behind its gate.

    Args:
        name: of the model, for clients. reader, scheduler, metrics, keys: what the routes work with. only_host: see
            `Middleware`.
    """
    app = FastAPI(title="opticnerve", version=__version__, docs_url=None, redoc_url=None)
    secured = [Security(HTTPBearer(auto_error=False))] if keys else []
    middleware = Middleware(app, limits=reader.limits, keys=keys, metrics=metrics, only_host=only_host)
    pool = ThreadPoolExecutor(READERS, "reader")
    _refusals(app)
    processor = reader.processor
    kinds = {"image": processor.image_processor, "audio": processor.feature_extractor}
    about = Model(
        id=name, created=int(time.time()), max_model_len=reader.context,
        modalities=["text", *(k for k, part in kinds.items() if part is not None)],  # type: ignore[list-item]
    )  # fmt: skip

    @app.post(
        CHAT, response_model=ChatCompletion, dependencies=secured, responses=_REFUSED | {200: {"content": _STREAMED}}
    )
    async def chat(asked: ChatRequest, request: Request) -> Any:
        """Answer a conversation. `stream: true` sends chunks as server-sent events, ended by `[DONE]`."""
        if asked.model != name:
            raise ApiError(
                404, f"there is no model {asked.model!r} here; this server has {name!r}", param="model",
                code="model_not_found",
            )  # fmt: skip
        started, told = request.state.started, request.state.told
        prompt, most = await asyncio.get_running_loop().run_in_executor(pool, reader.read, asked)
        listener = Listener()
        wishes = Wishes(
            asked.temperature, asked.top_p, asked.seed, (asked.top_logprobs or 0) if asked.logprobs else None
        )
        job = Job(
            prompt=prompt, wishes=wishes, choices=asked.n or 1, max_tokens=most, stops=asked.stops, tell=listener.tell,
            deadline=started + reader.limits.request_seconds,
        )  # fmt: skip
        scheduler.submit(job)
        answer = Answer(job, listener, request, model=name, logprobs=bool(asked.logprobs))
        done = _once(answer, told, metrics)
        try:
            await answer.begin()
            metrics.first_token.observe(time.monotonic() - started)
            if asked.stream:
                usage = asked.stream_options is not None and asked.stream_options.include_usage
                return EventStream(answer, include_usage=usage, done=done)
            whole = await answer.whole()
        except Gone:
            done()
            return Response(status_code=499)
        except BaseException:
            done()
            raise
        done()
        return JSONResponse(whole.model_dump(mode="json"))

    @app.get("/v1/models", dependencies=secured, responses=_REFUSED)
    async def models() -> ModelList:
        """The one model of this server."""
        return ModelList(data=[about])

    @app.get("/v1/models/{model:path}", dependencies=secured, responses=_REFUSED)
    async def one_model(model: str) -> Model:
        """The same, by its name."""
        if model != name:
            raise ApiError(404, f"there is no model {model!r} here", param="model", code="model_not_found")
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
        return Response(metrics.page(), media_type=Metrics.CONTENT_TYPE)

    return middleware


def _once(answer: Answer, told: dict[str, Any], metrics: Metrics) -> Callable[[], None]:
    def done() -> None:
        answer.end()
        usage = answer.usage()
        metrics.completion_tokens.inc(usage.completion_tokens)
        finish = ",".join(str(answer.finished.get(i, "gone")) for i in range(answer.job.choices))
        told.update(id=answer.id, prompt=usage.prompt_tokens, completion=usage.completion_tokens, finish=finish)

    return done


def _refusals(app: FastAPI) -> None:
    def respond(e: ApiError) -> JSONResponse:
        return JSONResponse(e.body, e.status, e.headers)

    @app.exception_handler(OpticNerveError)
    async def ours(_: Request, e: OpticNerveError) -> JSONResponse:
        return respond(e if isinstance(e, ApiError) else ApiError(400, str(e)))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, e: RequestValidationError) -> JSONResponse:
        return respond(from_validation(e.errors()))

    @app.exception_handler(HTTPException)
    async def routing(_: Request, e: HTTPException) -> JSONResponse:
        made = respond(ApiError(e.status_code, str(e.detail)))
        made.headers.update(e.headers or {})
        return made

    @app.exception_handler(Exception)
    async def broken(_: Request, e: Exception) -> JSONResponse:
        return respond(ApiError(500, "the server failed on this request; its log says more"))
