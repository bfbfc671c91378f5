"""What stands before the app: may this request come in, and is all of it here, in time and within bounds?

A request's body is read here, before anything parses it, counted as it comes: a header may lie about its length, and a
chunked body has none.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from opticnerve.serve.errors import ApiError
from opticnerve.serve.limits import Metrics, ServerLimits
from opticnerve.web.guard import App, Keys, Receive, Scope, Send, answers_to

log = logging.getLogger("opticnerve.serve")
OPEN = ("/health",)  # no key, and answered to the last
CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
RESPONSES = "/v1/responses"


class Middleware:
    """ASGI middleware.

    Args:
        app: the ASGI app behind it. limits, keys, metrics: of the server. hosts: as from `check_address`.

    It puts `started` (of `time.monotonic`) and `log_fields` (a dict for the log line) into the request's state.
    """

    def __init__(
        self, app: App, *, limits: ServerLimits, keys: Keys, metrics: Metrics, hosts: frozenset[str] | None
    ) -> None:
        self.app, self.limits, self.keys, self.metrics, self.hosts = app, limits, keys, metrics, hosts
        self.admitted, self.stopping = 0, False
        self._mean = 1.0  # seconds of a request, lately

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        chat = scope["path"] in (CHAT, COMPLETIONS, RESPONSES, EMBEDDINGS) and scope["method"] == "POST"
        started, status = time.monotonic(), 0
        log_fields: dict[str, Any] = {}
        scope.setdefault("state", {}).update(started=started, log_fields=log_fields)

        async def counting(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        taken = False
        try:
            self._may_enter(scope)
            if chat:
                self._acquire()
                taken = True
            body = await self._body(scope, receive)
            await self.app(scope, _again(body, receive), counting)
        except ApiError as e:
            await e.response()(scope, receive, counting)
        finally:
            if taken:
                self._count(-1)
            if chat:
                self._note(status, time.monotonic() - started, log_fields)

    def _may_enter(self, scope: Scope) -> None:
        if scope["path"] in OPEN:
            return
        headers = dict(scope["headers"])
        if not answers_to(headers, self.hosts):
            raise ApiError(403, "this server answers to localhost alone; give it an API key to use another name")
        given = headers.get(b"authorization", b"")
        if self.keys and not self.keys.admits(given):
            if given[:7].lower() != b"bearer " or not given[7:]:
                raise ApiError(401, "send an API key as the header Authorization: Bearer KEY", code="missing_api_key")
            raise ApiError(401, "this API key is not known here", code="invalid_api_key")
        if self.stopping and scope["path"] != "/metrics":
            raise ApiError(503, "the server is stopping", retry_after=5)

    def _acquire(self) -> None:
        if self.admitted >= self.limits.admitted:
            turns = self.limits.queue / self.limits.slots
            raise ApiError(
                429, f"{self.admitted} requests are being answered or wait, as many as this server takes; try later",
                code="queue_full", retry_after=max(1, min(60, round(turns * self._mean))),
            )  # fmt: skip
        self._count(1)

    def _count(self, change: int) -> None:
        self.admitted += change
        self.metrics.admitted.set(self.admitted)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        most = self.limits.body_bytes
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > most:
            raise ApiError(413, f"the body has {int(length):,} bytes, more than the {most:,} allowed")
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(408, "the connection ended before the body did")
                    size += len(message.get("body", b""))
                    if size > most:
                        raise ApiError(413, f"the body has more than the {most:,} bytes allowed")
                    parts.append(message.get("body", b""))
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within {self.limits.body_seconds:g} s; {size:,} bytes did"
            ) from None

    def _note(self, status: int, seconds: float, log_fields: dict[str, Any]) -> None:
        """One line a request, and no word of what it said."""
        self.metrics.requests.labels(str(status or 499)).inc()  # 499: nginx's number for a client that went away
        self.metrics.seconds.observe(seconds)
        if status == 200:
            self._mean += 0.1 * (seconds - self._mean)
        words = " ".join(f"{k}={v}" for k, v in log_fields.items())
        log.info("%s status=%s seconds=%.3f", words or "refused", status or 499, seconds)


def _again(body: bytes, receive: Receive) -> Receive:
    """An ASGI `receive` that gives the body once more, and then what else comes: the client's going away."""
    given = False

    async def replay() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
