"""An answer on its way out: whole, or in pieces as server-sent events."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from opticnerve.serve.errors import ApiError
from opticnerve.serve.schema import (
    AnswerMessage,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChunkChoice,
    Delta,
    Logprobs,
    TokenLogprob,
    Usage,
)
from opticnerve.serve.sequence import Event, Job, Piece

PATIENCE = 15.0  # seconds past a deadline after which the model's thread is taken for stuck


class Gone(Exception):
    """The client went away."""


class Listener:
    """Hears in the event loop what the model's thread tells of one job."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Event | None] = asyncio.Queue()

    def tell(self, event: Event | None) -> None:
        """Called from any thread. None: the client went away."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class Answer:
    """One request's answer.

    Args:
        job, listener: its two ends. request: watched for the client's going away, which cancels the job. model: the
            name that clients know. logprobs: whether they asked.
    """

    def __init__(self, job: Job, listener: Listener, request: Request, *, model: str, logprobs: bool) -> None:
        self.job, self.listener, self.request, self.model, self.logprobs = job, listener, request, model, logprobs
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.counts = [0] * job.choices
        self.finished: dict[int, Any] = {}
        self._watch = asyncio.create_task(self._watch_client())
        self._first: Piece | None = None

    async def begin(self) -> None:
        """Wait for the first token: what fails before it fails with a status of its own."""
        self._first = await self._next()

    async def pieces(self) -> AsyncIterator[Piece]:
        """All of them, the first included."""
        assert self._first is not None
        piece = self._first
        while True:
            yield piece
            if len(self.finished) == self.job.choices:
                return
            piece = await self._next()

    async def whole(self) -> ChatCompletion:
        texts = [""] * self.job.choices
        spoken: list[list[TokenLogprob]] = [[] for _ in texts]
        async for piece in self.pieces():
            texts[piece.number] += piece.text
            spoken[piece.number] += piece.logprobs
        choices = [
            Choice(
                index=i, message=AnswerMessage(content=text), finish_reason=self.finished[i],
                logprobs=Logprobs(content=spoken[i]) if self.logprobs else None,
            )
            for i, text in enumerate(texts)
        ]  # fmt: skip
        return ChatCompletion(id=self.id, created=self.created, model=self.model, choices=choices, usage=self.usage())

    def usage(self) -> Usage:
        prompt, said = len(self.job.prompt.ids), sum(self.counts)
        return Usage(prompt_tokens=prompt, completion_tokens=said, total_tokens=prompt + said)

    def end(self) -> None:
        """Whatever happened: the job's rows are free."""
        self.job.cancel()
        self._watch.cancel()

    async def _next(self) -> Piece:
        try:
            async with asyncio.timeout(max(0.0, self.job.deadline - time.monotonic()) + PATIENCE):
                event = await self.listener.events.get()
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

    async def _watch_client(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self.job.cancel()
        self.listener.tell(None)


class EventStream(Response):
    """An answer as server-sent events, ended by `[DONE]`.

    Args:
        answer: begun. include_usage: a last chunk with the numbers of tokens.
    """

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, *, include_usage: bool, done: Any) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.answer, self.include_usage, self.done = answer, include_usage, done

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for event in self.events():
                await send({"type": "http.response.body", "body": f"data: {event}\n\n".encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
        except ApiError as e:  # too late for a status
            line = f"data: {_json(e.body)}\n\n".encode()
            await send({"type": "http.response.body", "body": line, "more_body": False})
        except (Gone, OSError):
            return
        finally:
            self.done()

    async def events(self) -> AsyncIterator[str]:
        answer = self.answer
        for i in range(answer.job.choices):
            yield self._chunk(i, Delta(role="assistant", content=""))
        async for piece in answer.pieces():
            if piece.text or piece.logprobs:
                logprobs = Logprobs(content=piece.logprobs) if answer.logprobs else None
                yield self._chunk(piece.number, Delta(content=piece.text), logprobs)
            if piece.finish is not None:
                yield self._chunk(piece.number, Delta(), finish=piece.finish)
        if self.include_usage:
            yield self._dump([], answer.usage())

    def _chunk(self, number: int, delta: Delta, logprobs: Logprobs | None = None, finish: Any = None) -> str:
        return self._dump([ChunkChoice(index=number, delta=delta, logprobs=logprobs, finish_reason=finish)], None)

    def _dump(self, choices: list[ChunkChoice], usage: Usage | None) -> str:
        a = self.answer
        chunk = ChatCompletionChunk(id=a.id, created=a.created, model=a.model, choices=choices, usage=usage)
        made = chunk.model_dump(mode="json")
        for choice in made["choices"]:
            choice["delta"] = {k: v for k, v in choice["delta"].items() if v is not None}
        if not self.include_usage:
            del made["usage"]
        return _json(made)


def _json(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
