"""The HTTP side: routes, and every refusal in OpenAI's shape."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, NamedTuple

from fastapi import FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from opticnerve.common.version import __version__
from opticnerve.serve.answers import Answer, ChatAnswer, CompletionAnswer, EventStream, Gone
from opticnerve.serve.embeddings import EmbeddingMaker
from opticnerve.serve.errors import ApiError, from_validation
from opticnerve.serve.limits import Metrics, ServerLimits
from opticnerve.serve.middleware import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, Middleware
from opticnerve.serve.prompts import PromptReader
from opticnerve.serve.replies import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    EmbeddingList,
    ErrorResponse,
    Health,
    Model,
    ModelList,
    ResponseEvent,
    ResponseObject,
)
from opticnerve.serve.responses import ResponsesAnswer
from opticnerve.serve.responses_schema import ResponsesRequest
from opticnerve.serve.scheduler import Scheduler
from opticnerve.serve.schema import ChatRequest, CompletionRequest, EmbeddingRequest
from opticnerve.types import OpticNerveError
from opticnerve.web.guard import Keys

READERS = 2  # threads that open pictures
_REFUSED: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}}


class Access(NamedTuple):
    """Who may ask, and how much. `keys`: of clients. `hosts`: as from `check_address`."""

    limits: ServerLimits
    metrics: Metrics
    keys: Keys
    hosts: frozenset[str] | None


def create_app(name: str, reader: PromptReader, scheduler: Scheduler, access: Access) -> Middleware:
    """The ASGI app of a model that answers, behind its middleware.

    Args:
        name: of the model, for clients. reader, scheduler: what the routes work with.
    """
    kinds = {"image": reader.processor.image_processor, "audio": reader.processor.feature_extractor}
    about = Model(
        id=name, created=int(time.time()), max_model_len=reader.context,
        modalities=["text", *(k for k, part in kinds.items() if part is not None)],
    )  # fmt: skip
    site = _Site(about, access, lambda: (scheduler.alive, len(scheduler.waiting), scheduler.running))
    metrics = access.metrics

    async def sent(answer: Answer) -> Response:
        try:
            answer.submit(scheduler)
            await answer.begin()
            if answer.asked.stream:
                return EventStream(answer)
            whole: Response = JSONResponse((await answer.whole()).model_dump(mode="json"))
        except Gone:
            whole = Response(status_code=499)
        except BaseException:
            answer.end()
            raise
        answer.end()
        return whole

    def deadline(request: Request) -> float:
        return float(request.state.started + reader.limits.request_seconds)

    @site.app.post(CHAT, response_model=ChatCompletion, **site.answers(ChatCompletionChunk))
    async def chat(asked: ChatRequest, request: Request) -> Any:
        """Answer a conversation. `stream: true` sends chunks as server-sent events, ended by `[DONE]`."""
        site.check_name(asked.model)
        prompt = await site.in_thread(reader.read, asked)
        return await sent(ChatAnswer(asked, [prompt], request, metrics, deadline(request)))

    @site.app.post(COMPLETIONS, response_model=Completion, **site.answers(Completion))
    async def complete(asked: CompletionRequest, request: Request) -> Any:
        """Continue a text, with no chat template around it. `stream: true` as in chat."""
        site.check_name(asked.model)
        prompts = await site.in_thread(reader.read_plain, asked)
        return await sent(CompletionAnswer(asked, prompts, request, metrics, deadline(request)))

    @site.app.post(RESPONSES, response_model=ResponseObject, **site.answers(ResponseEvent))
    async def respond(asked: ResponsesRequest, request: Request) -> Any:
        """Answer in items of one output, of the same question as in chat. `stream: true` sends its events."""
        site.check_name(asked.model)
        chat = asked.chat()
        try:
            prompt = await site.in_thread(reader.read, chat)
        except ApiError as e:
            raise asked.renamed(e) from None
        return await sent(ResponsesAnswer(asked, chat, prompt, request, metrics, deadline(request)))

    return site.middleware


def create_embedding_app(name: str, maker: EmbeddingMaker, access: Access) -> Middleware:
    """The ASGI app of a dual encoder, behind its middleware. `maker`: what makes vectors."""
    about = Model(id=name, created=int(time.time()), max_model_len=maker.longest, modalities=["text", "image"])
    site = _Site(about, access, lambda: (True, 0, site.middleware.admitted), pool=maker.pool)

    @site.app.post(EMBEDDINGS, response_model=EmbeddingList, dependencies=site.secured, responses=_REFUSED)
    async def embed(asked: EmbeddingRequest) -> Any:
        """Vectors of length 1 for texts, and for pictures as data URLs."""
        site.check_name(asked.model)
        return JSONResponse((await site.in_thread(maker.make, asked)).model_dump(mode="json"))

    return site.middleware


class _Site:
    """What all servers have: refusals, the model's name, health and metrics.

    Args:
        about: the model. state: whether it lives, and how many requests wait and run. pool: where work is done that
            would hold the event loop.
    """

    def __init__(
        self,
        about: Model,
        access: Access,
        state: Callable[[], tuple[bool, int, int]],
        pool: Executor | None = None,
    ) -> None:
        self.about, self.pool = about, pool or ThreadPoolExecutor(READERS, "reader")
        self.app = app = FastAPI(title="opticnerve", version=__version__, docs_url=None, redoc_url=None)
        self.secured = [Security(HTTPBearer(auto_error=False))] if access.keys else []
        self.middleware = Middleware(
            app, limits=access.limits, keys=access.keys, metrics=access.metrics, hosts=access.hosts
        )
        for kind in (OpticNerveError, RequestValidationError, HTTPException, Exception):
            app.add_exception_handler(kind, _refuse)

        @app.get("/v1/models", dependencies=self.secured, responses=_REFUSED)
        async def models() -> ModelList:
            """The one model of this server."""
            return ModelList(data=[about])

        @app.get("/v1/models/{model:path}", dependencies=self.secured, responses=_REFUSED)
        async def one_model(model: str) -> Model:
            """The same, by its name."""
            self.check_name(model)
            return about

        @app.get("/health", responses={503: {"model": Health}})
        async def health() -> Any:
            """200 while requests are taken; 503 when the server is stopping or its model has failed."""
            alive, waiting, running = state()
            status = "failed" if not alive else "stopping" if self.middleware.stopping else "ok"
            found = Health(status=status, waiting=waiting, running=running)
            return JSONResponse(found.model_dump(), 200 if status == "ok" else 503)

        @app.get("/metrics", dependencies=self.secured, response_class=Response, responses=_REFUSED)
        async def page() -> Response:
            """For Prometheus."""
            return Response(generate_latest(access.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def answers(self, chunk: type[BaseModel]) -> dict[str, Any]:
        """Options of a route whose answers may be streamed as such chunks."""
        streamed = {"text/event-stream": {"schema": chunk.model_json_schema()}}
        return {"dependencies": self.secured, "responses": _REFUSED | {200: {"content": streamed}}}

    def check_name(self, model: str) -> None:
        if model != self.about.id:
            raise ApiError(
                404, f"there is no model {model!r} here; this server has {self.about.id!r}", param="model",
                code="model_not_found",
            )  # fmt: skip

    async def in_thread(self, function: Callable[[Any], Any], asked: object) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.pool, function, asked)


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
