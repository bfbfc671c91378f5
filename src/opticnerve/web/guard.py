"""Whom a server lets in: keys and logins, the names it answers to, and what every request to the page passes.

Gradio has a login and checks of its own; `Guard` stands before all of its routes, uploads and files too. The API
server's own errors and limits are in `serve.middleware`, which asks here who may enter.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse

from opticnerve.types import OpticNerveError
from opticnerve.web.listen import is_loopback

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
HEADERS = {"content-security-policy": POLICY, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
WRONG_SECONDS = 1.0  # what a wrong password costs whoever tries many


LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class Secrets:
    """What lets somebody in, kept as digests alone; with none, everybody may enter."""

    scheme: bytes  # of the `Authorization` header
    options: str  # that give one
    may: str  # what whoever enters may do

    def __init__(self, secrets: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(self.checked(secret).encode()).digest() for secret in secrets]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def checked(self, secret: str) -> str:
        """The secret, if it is one. Raises OpticNerveError: it has another form, or is too short."""
        raise NotImplementedError

    def decoded(self, given: bytes) -> bytes:
        return given

    def admits(self, authorization: bytes) -> bool:
        """Whether an `Authorization` header holds one of them, compared in a time that depends on none of them."""
        scheme, _, given = authorization.partition(b" ")
        if scheme.lower() != self.scheme:
            return False
        try:
            digest = hashlib.sha256(self.decoded(given.strip())).digest()
        except (binascii.Error, ValueError):
            return False
        return bool(sum(hmac.compare_digest(digest, known) for known in self._digests))


class Keys(Secrets):
    """API keys, sent as `Authorization: Bearer KEY`."""

    scheme, options, may = b"bearer", "--api-key (or OPTICNERVE_API_KEY)", "use it"

    def checked(self, secret: str) -> str:
        if len(secret) < 8 or secret.strip() != secret or not secret.isascii():
            raise OpticNerveError(
                f"an API key wants 8 or more ASCII characters without spaces around; this one has {len(secret)}. "
                "Make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'",
                kind="out-of-range",
            )
        return secret


class Logins(Secrets):
    """`user:password` pairs, sent as HTTP's Basic authentication has it (RFC 7617)."""

    scheme, options = b"basic", "--login-file (or OPTICNERVE_UI_LOGIN)"
    may = "use the page, see the runs and train"

    def checked(self, secret: str) -> str:
        user, colon, password = secret.partition(":")
        if not (user and colon) or len(password) < 8:
            raise OpticNerveError(
                "a login is written user:password, with 8 or more characters of password; make one with: "
                "python -c 'import secrets; print(\"me:\" + secrets.token_urlsafe(16))'",
                kind="wrong-type",
            )
        return secret

    def decoded(self, given: bytes) -> bytes:
        return base64.b64decode(given, validate=True)


def read_secrets(path: Path | None) -> list[str]:
    """Those of a file, one a line; empty lines and `#` lines do not count."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines()) if path else ()
    return [line for line in lines if line and not line.startswith("#")]


def check_address(host: str, secrets: Secrets, *, no_auth: bool) -> frozenset[str] | None:
    """The names that a server which listens on `host` shall answer to; None for all of them. Raises OpticNerveError: no
    such address; or others reach it, and neither a secret nor `no_auth` is given."""
    local = is_loopback(host)
    if not local and not secrets and not no_auth:
        raise OpticNerveError(
            f"{host} is reached by other machines: give {secrets.options}, or --no-auth if everybody who reaches it "
            f"may {secrets.may}",
            kind="missing-field",
        )
    return LOCAL_NAMES | {host.lower()} if local and not secrets and not no_auth else None


def answers_to(headers: Mapping[bytes, bytes], hosts: frozenset[str] | None) -> bool:
    """Whether the request's `Host`, its port left out, is among `hosts`.

    A server for this machine alone answers to no other name, or a web page elsewhere could talk to it under a name of
    its own (DNS rebinding).
    """
    host = headers.get(b"host", b"").decode("latin-1").lower()
    name = host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]
    return hosts is None or name in hosts


class Guard:
    """An ASGI application around another.

    Args:
        app: the pages.
        logins: who may enter.
        hosts: as from `check_address`.
        body_bytes: of one request.
    """

    def __init__(self, app: App, *, logins: Logins, hosts: frozenset[str] | None, body_bytes: int) -> None:
        self.app, self.logins, self.hosts, self.body_bytes = app, logins, hosts, body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page speaks no WebSocket
            raise OpticNerveError(f"no {scope['type']} here", kind="unsupported")
        headers = dict(scope["headers"])
        if (refusal := self._refusal(scope["method"], headers)) is not None:
            if refusal.status_code == 401 and b"authorization" in headers:
                await asyncio.sleep(WRONG_SECONDS)
            refusal.headers.update(HEADERS)
            await refusal(scope, receive, send)
            return

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, self._counted(receive), with_headers)

    def _refusal(self, method: str, headers: dict[bytes, bytes]) -> PlainTextResponse | None:
        if not answers_to(headers, self.hosts):
            return PlainTextResponse("this page answers to localhost alone; give it a login to use another name", 403)
        if self.logins and not self.logins.admits(headers.get(b"authorization", b"")):
            asks = {"www-authenticate": 'Basic realm="opticnerve"'}
            return PlainTextResponse("a user and password are wanted", 401, asks)
        origin, host = (headers.get(name, b"").decode("latin-1").lower() for name in (b"origin", b"host"))
        # A browser sends a login along whichever site a request comes from (cross-site request forgery).
        if method not in ("GET", "HEAD") and b"origin" in headers and urlsplit(origin).netloc != host:
            return PlainTextResponse("this request comes from another site", 403)
        if int(headers.get(b"content-length") or 0) > self.body_bytes:
            return PlainTextResponse(f"a request may hold {self.body_bytes:,} bytes", 413)
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
