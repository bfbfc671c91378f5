"""What every request passes before it reaches the page: who asks, under which name, from which site, and how much.

The page's own framework has a login and checks of its own; this stands before all of its routes, uploads and files too.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from opticnerve.types import OpticNerveError
from opticnerve.web.listen import Secrets

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# Whatever a page or an answer names, the browser fetches nothing from elsewhere (Content Security Policy, level 3).
# Gradio's page runs inline scripts and makes its components from strings.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]
WRONG_SECONDS = 1.0  # what a wrong password costs whoever tries many


class Logins:
    """`user:password` pairs, kept as digests; with none, everybody may enter.

    Raises:
        OpticNerveError: a pair without a colon or user, or a password of fewer than 8 characters.
    """

    def __init__(self, pairs: Sequence[str]) -> None:
        for pair in pairs:
            user, colon, password = pair.partition(":")
            if not (user and colon) or len(password) < 8:
                raise OpticNerveError(
                    "a login is written user:password, with 8 or more characters of password; make one with: "
                    "python -c 'import secrets; print(\"me:\" + secrets.token_urlsafe(16))'"
                )
        self._known = Secrets(pairs)

    def __bool__(self) -> bool:
        return bool(self._known)

    def admits(self, authorization: bytes) -> bool:
        """Whether an `Authorization: Basic …` header holds one of the pairs (RFC 7617)."""
        scheme, _, given = authorization.partition(b" ")
        if scheme.lower() != b"basic":
            return False
        try:
            return self._known.hold(base64.b64decode(given.strip(), validate=True))
        except (binascii.Error, ValueError):
            return False


class Guard:
    """An ASGI application around another.

    Args:
        app: the pages.
        logins: who may enter.
        hosts: the names that the page answers to; None for all. Without logins it should answer to this machine's
            names alone, or a web page elsewhere could talk to it under a name of its own (DNS rebinding).
        body_bytes: of one request.
    """

    def __init__(self, app: App, *, logins: Logins, hosts: frozenset[str] | None, body_bytes: int) -> None:
        self.app, self.logins, self.hosts, self.body_bytes = app, logins, hosts, body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page speaks no WebSocket
            raise OpticNerveError(f"no {scope['type']} here")
        headers = dict(scope["headers"])
        if (refusal := self._refusal(scope["method"], headers)) is not None:
            status, message, more = refusal
            if status == 401 and b"authorization" in headers:
                await asyncio.sleep(WRONG_SECONDS)
            body = message.encode()
            start = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": status, "headers": [*start, *more, *HEADERS]})
            await send({"type": "http.response.body", "body": body})
            return

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
            await send(message)

        await self.app(scope, self._counted(receive), with_headers)

    def _refusal(self, method: str, headers: dict[bytes, bytes]) -> tuple[int, str, list[tuple[bytes, bytes]]] | None:
        place = headers.get(b"host", b"").decode("latin-1").lower()
        if self.hosts is not None and _name(place) not in self.hosts:
            return 403, "this page answers to localhost alone; give it a login to use another name", []
        if self.logins and not self.logins.admits(headers.get(b"authorization", b"")):
            return 401, "a user and password are wanted", [(b"www-authenticate", b'Basic realm="opticnerve"')]
        origin = headers.get(b"origin")
        changes = method not in ("GET", "HEAD")
        # A browser sends a login along whichever site a request comes from (cross-site request forgery).
        if changes and origin is not None and urlsplit(origin.decode("latin-1").lower()).netloc != place:
            return 403, "this request comes from another site", []
        if int(headers.get(b"content-length") or 0) > self.body_bytes:
            return 413, f"a request may hold {self.body_bytes:,} bytes", []
        return None

    def _counted(self, receive: Receive) -> Receive:
        """The body as it comes; one that grows beyond what it may (no length was given) ends as if the browser left."""
        taken = 0

        async def counted() -> MutableMapping[str, Any]:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            return {"type": "http.disconnect"} if taken > self.body_bytes else message

        return counted


def _name(place: str) -> str:
    """The host of a `Host` header, its port left out."""
    return place[1 : place.find("]")] if place.startswith("[") else place.partition(":")[0]
