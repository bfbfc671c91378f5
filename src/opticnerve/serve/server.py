"""A server from its model to its end: what `opticnerve serve` runs."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from opticnerve.inference.generate import Answerer
from opticnerve.models.dual_encoder.modeling import DualEncoder
from opticnerve.models.dual_encoder.processing import DualEncoderProcessor
from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
from opticnerve.serve.app import Access, create_app, create_embedding_app
from opticnerve.serve.batch import why_alone
from opticnerve.serve.embeddings import EmbeddingMaker
from opticnerve.serve.limits import Metrics, ServerLimits
from opticnerve.serve.media import MediaSources
from opticnerve.serve.middleware import Middleware
from opticnerve.serve.prompts import PromptReader
from opticnerve.serve.sampling import check_plain
from opticnerve.serve.scheduler import Scheduler
from opticnerve.types import OpticNerveError
from opticnerve.web.guard import Keys

log = logging.getLogger("opticnerve.serve")


@dataclass(kw_only=True)
class ModelService(ABC):
    """All parts of a server but its socket.

    Args:
        model, processor: as from `load_model`. name: for clients. limits, keys, sources: what it takes, from whom, from
            where. hosts: as from `check_address`.
    """

    model: Any
    processor: Any
    name: str
    limits: ServerLimits = field(default_factory=ServerLimits)
    keys: Sequence[str] = ()
    sources: MediaSources = field(default_factory=MediaSources)
    hosts: frozenset[str] | None = None
    middleware: Middleware = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = Metrics()
        self.access = Access(self.limits, self.metrics, Keys(self.keys), self.hosts)

    @abstractmethod
    def stop(self) -> None:
        """End now. Returns when no thread of the model's is left."""


class Service(ModelService):
    """Of a model that answers; `scheduler` has begun."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_plain(self.model)
        answerer = Answerer(self.model, self.processor)
        self.reader = PromptReader(answerer, self.sources, self.limits)
        self.scheduler = Scheduler(answerer, slots=self.limits.slots, metrics=self.metrics)
        self.middleware = create_app(self.name, self.reader, self.scheduler, self.access)
        if (why := why_alone(self.model)) is not None:
            log.warning("requests are answered one after another: %s", why)
        self.scheduler.start()

    def stop(self) -> None:
        """End now: what runs is cut off, what waits is refused. Returns when the model's thread has ended."""
        self.scheduler.stop()


class EmbeddingService(ModelService):
    """Of a dual encoder, which answers nothing but `/v1/embeddings`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.maker = EmbeddingMaker(self.model, self.processor, self.sources, self.limits, self.metrics)
        self.middleware = create_embedding_app(self.name, self.maker, self.access)

    def stop(self) -> None:
        """End: what waits is left."""
        self.maker.pool.shutdown(cancel_futures=True)


def service_of(model: object, processor: object, **options: Any) -> Service | EmbeddingService:
    """The service that a model of this family can give; `options` as for `ModelService`.

    Raises:
        OpticNerveError: it neither answers nor makes vectors (a classifier).
    """
    if isinstance(model, OpticNerveForConditionalGeneration):
        return Service(model=model, processor=processor, **options)
    if isinstance(model, DualEncoder) and isinstance(processor, DualEncoderProcessor):
        return EmbeddingService(model=model, processor=processor, **options)
    raise OpticNerveError(
        f"{type(model).__name__} neither answers nor makes vectors, so there is nothing to serve; `opticnerve "
        "classify` takes it", kind="unsupported",
    )  # fmt: skip


class Server(uvicorn.Server):
    """uvicorn, which stops when told in this order: new requests get 503, running answers end, the socket closes.

    Answers that still run after `grace_seconds` are cut off (`finish_reason` "length"). A second signal ends at once.
    """

    def __init__(self, service: ModelService) -> None:
        limits = service.limits
        self.service, self.give_up = service, 0.0
        super().__init__(
            uvicorn.Config(
                service.middleware, http=_timed(limits.head_seconds), ws="none", lifespan="off", access_log=False,
                log_config=None, server_header=False, timeout_graceful_shutdown=5,
            )
        )  # fmt: skip

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.middleware.stopping:
            self.force_exit = self.should_exit = True
        self.stop()

    def stop(self) -> None:
        """Begin to stop; `serve` and `run` return when it is done."""
        self.give_up = time.monotonic() + self.service.limits.grace_seconds
        self.service.middleware.stopping = True

    async def on_tick(self, counter: int) -> bool:
        middleware = self.service.middleware
        if middleware.stopping and not self.should_exit:
            over = time.monotonic() >= self.give_up
            if over:
                await asyncio.to_thread(self.service.stop)
            self.should_exit = middleware.admitted == 0 or over
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        await asyncio.to_thread(self.service.stop)


def _timed(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, which closes a connection whose next request's head does not arrive in time."""

    class Timed(H11Protocol):
        _head: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._head = self.loop.call_later(seconds, self._too_slow)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            answering = self.cycle is not None and not self.cycle.response_complete
            if answering and self._head is not None:
                self._head.cancel()
                self._head = None
            elif not answering and self._head is None:
                self._head = self.loop.call_later(seconds, self._too_slow)

        def connection_lost(self, exc: Exception | None) -> None:
            if self._head is not None:
                self._head.cancel()
            super().connection_lost(exc)

        def _too_slow(self) -> None:
            self._head = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return Timed
