"""An answer on its way out: heard from the model's thread, and sent whole or in pieces."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, ClassVar

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel

from opticnerve.serve.errors import ApiError
from opticnerve.serve.limits import Metrics
from opticnerve.serve.replies import (
    AnswerMessage,
    ChatCompletion,
    Choice,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Logprobs,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from opticnerve.serve.scheduler import Scheduler
from opticnerve.serve.schema import CompletionRequest, SampledRequest
from opticnerve.serve.sequence import AnswerPiece, GenerationJob, PromptInputs
from opticnerve.web.guard import Receive, Scope, Send

PATIENCE = 15.0  # seconds past a deadline after which the model's thread is taken for stuck
Body = dict[str, Any]


class Gone(Exception):
    """The client went away."""


class Answer:
    """One request's answers, heard in the event loop from the model's thread.

    Args:
        asked, prompts: what is answered; each prompt has the request's number of choices. request: whose log line gets
            the numbers. deadline: in seconds of `time.monotonic`.
    """

    prefix: ClassVar[str]  # of the answer's id
    done: ClassVar[str] = ""  # what ends a stream

    def __init__(
        self,
        asked: SampledRequest,
        prompts: Sequence[PromptInputs],
        request: Request,
        metrics: Metrics,
        deadline: float,
    ) -> None:
        self.asked, self.request, self.metrics, self.deadline = asked, request, metrics, deadline
        self.jobs = [
            GenerationJob(asked, prompt, deadline, partial(self._hear, i * asked.choices))
            for i, prompt in enumerate(prompts)
        ]
        self.loop, self.events = asyncio.get_running_loop(), asyncio.Queue[AnswerPiece | ApiError | None]()
        self.head: Body = {"id": f"{self.prefix}{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
        self.choices = len(self.jobs) * asked.choices
        self.counts, self.finished = [0] * self.choices, dict[int, Any]()
        self._watch: asyncio.Task[None] | None = None

    def _hear(self, first: int, event: AnswerPiece | ApiError) -> None:
        """Called from the model's thread by the job whose choices begin with number `first`."""
        self._tell(replace(event, number=event.number + first) if isinstance(event, AnswerPiece) else event)

    def _tell(self, event: AnswerPiece | ApiError | None) -> None:
        """Called from any thread. None: the client went away."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    def submit(self, scheduler: Scheduler) -> None:
        """Queue the jobs, which are cancelled when the client goes away. Raises ApiError: the scheduler takes none."""

        async def watched() -> None:
            while (await self.request.receive())["type"] != "http.disconnect":
                pass
            self._cancel()
            self._tell(None)

        self._watch = asyncio.create_task(watched())
        for job in self.jobs:
            scheduler.submit(job)

    async def begin(self) -> None:
        """Wait for the first token: what fails before it fails with a status of its own."""
        self._first = await self._next()
        self.metrics.first_token.observe(time.monotonic() - self.request.state.started)

    async def pieces(self) -> AsyncIterator[AnswerPiece]:
        """All of them, the first included."""
        piece = self._first
        while True:
            yield piece
            if len(self.finished) == self.choices:
                return
            piece = await self._next()

    async def whole(self) -> BaseModel:
        """The answer as one body."""
        said: dict[int, AnswerPiece] = {}
        async for piece in self.pieces():
            before = said.get(piece.number)
            said[piece.number] = piece if before is None else before + piece
        return self._body([said[i] for i in range(self.choices)])

    def usage(self) -> Usage:
        prompt, said = sum(len(job.prompt.ids) for job in self.jobs), sum(self.counts)
        return Usage(prompt_tokens=prompt, completion_tokens=said, total_tokens=prompt + said)

    def end(self) -> None:
        """Whatever happened: the jobs' rows are free, and the log line has its numbers."""
        self._cancel()
        if self._watch is not None:
            self._watch.cancel()
        usage = self.usage()
        self.metrics.completion_tokens.inc(usage.completion_tokens)
        self.request.state.log_fields.update(
            id=self.head["id"], prompt=usage.prompt_tokens, completion=usage.completion_tokens,
            finish=",".join(str(self.finished.get(i, "gone")) for i in range(self.choices)),
        )  # fmt: skip

    def _cancel(self) -> None:
        for job in self.jobs:
            job.gone.set()

    async def _next(self) -> AnswerPiece:
        try:
            async with asyncio.timeout(max(0.0, self.deadline - time.monotonic()) + PATIENCE):
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

    # -- what each kind says in its own words --------------------------------------------------------------------------

    def _body(self, said: list[AnswerPiece]) -> BaseModel:
        """Of the choices, each as one piece."""
        raise NotImplementedError

    def opened(self) -> Iterator[Body]:
        """The events of a stream before anything is known."""
        return iter(())

    def streamed(self, piece: AnswerPiece) -> Iterator[Body]:
        """A piece as events."""
        raise NotImplementedError

    def closed(self) -> Iterator[Body]:
        """The events behind the last piece."""
        return iter(())

    def failed(self, why: ApiError) -> Body:
        """The last event, where it is too late for a status."""
        return why.body


class ChoicesAnswer(Answer):
    """An answer of several choices, streamed as chunks."""

    chunk: ClassVar[str]  # what one is called
    done = "data: [DONE]\n\n"

    @property
    def include_usage(self) -> bool:
        options = self.asked.stream_options
        return options is not None and bool(options.include_usage)

    def closed(self) -> Iterator[Body]:
        if self.include_usage:
            yield self._chunk() | {"usage": self.usage().model_dump()}

    def _chunk(self, *choices: Body) -> Body:
        made = {"object": self.chunk, **self.head, "choices": list(choices)}
        return made | {"usage": None} if self.include_usage else made


class ChatAnswer(ChoicesAnswer):
    """An answer in chat."""

    prefix, chunk = "chatcmpl-", "chat.completion.chunk"

    def _body(self, said: list[AnswerPiece]) -> BaseModel:
        choices = []
        for i, piece in enumerate(said):
            calls = [*piece.calls]
            message = AnswerMessage(content=piece.text or (None if calls else ""), tool_calls=calls or None)
            logprobs = self._logprobs(piece.logprobs)
            choices.append(Choice(index=i, finish_reason=self.finished[i], logprobs=logprobs, message=message))
        return ChatCompletion(**self.head, choices=choices, usage=self.usage())

    def opened(self) -> Iterator[Body]:
        for i in range(self.choices):
            yield self._delta(i, {"role": "assistant", "content": ""})

    def streamed(self, piece: AnswerPiece) -> Iterator[Body]:
        if piece.text or piece.logprobs:
            yield self._delta(piece.number, {"content": piece.text}, self._logprobs(piece.logprobs))
        if piece.calls:
            called = [ToolCallDelta(index=i, **c.model_dump()).model_dump() for i, c in enumerate(piece.calls)]
            yield self._delta(piece.number, {"tool_calls": called})
        if piece.finish is not None:
            yield self._delta(piece.number, {}, finish=piece.finish)

    def _logprobs(self, found: list[TokenLogprob]) -> Logprobs | None:
        return Logprobs(content=found) if self.asked.likeliest is not None else None

    def _delta(self, number: int, delta: Body, logprobs: Logprobs | None = None, finish: str | None = None) -> Body:
        content = logprobs.model_dump() if logprobs is not None else None
        return self._chunk({"index": number, "delta": delta, "logprobs": content, "finish_reason": finish})


class CompletionAnswer(ChoicesAnswer):
    """How a plain text goes on."""

    prefix, chunk = "cmpl-", "text_completion"
    asked: CompletionRequest

    def _body(self, said: list[AnswerPiece]) -> BaseModel:
        return Completion(**self.head, choices=[self._choice(piece) for piece in said], usage=self.usage())

    def streamed(self, piece: AnswerPiece) -> Iterator[Body]:
        yield self._chunk(self._choice(piece).model_dump())

    def _choice(self, piece: AnswerPiece) -> CompletionChoice:
        logprobs = self._logprobs(piece.number, piece.logprobs)
        return CompletionChoice(index=piece.number, text=piece.text, logprobs=logprobs, finish_reason=piece.finish)

    @cached_property
    def _letters(self) -> Counter[int]:
        """How many of each choice's tokens were told so far."""
        return Counter()

    def _logprobs(self, number: int, found: list[TokenLogprob]) -> CompletionLogprobs | None:
        if self.asked.likeliest is None:
            return None
        made = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token in found:
            # Nothing stands before an echoed prompt's first token.
            first = self.asked.echo and self._letters[number] == 0 and not made.tokens
            top = {t.token: t.logprob for t in [*token.top_logprobs, token]} if self.asked.likeliest else None
            made.tokens.append(token.token)
            made.token_logprobs.append(None if first else token.logprob)
            made.top_logprobs.append(None if first else top)
            made.text_offset.append(self._letters[number])
            self._letters[number] += len(token.token)
        return made


class EventStream(Response):
    """An answer that has begun as server-sent events; those that have a `type` are called by it."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def put(text: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            for event in self.answer.opened():
                await put(_event(event))
            async for piece in self.answer.pieces():
                for event in self.answer.streamed(piece):
                    await put(_event(event))
            for event in self.answer.closed():
                await put(_event(event))
            await put(self.answer.done, more=False)
        except ApiError as e:  # too late for a status
            await put(_event(self.answer.failed(e)), more=False)
        except (Gone, OSError):
            return
        finally:
            self.answer.end()


def _event(body: Body) -> str:
    name = f"event: {body['type']}\n" if "type" in body else ""
    return f"{name}data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
