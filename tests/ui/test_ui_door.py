"""What passes the door before the page, and where the page may listen."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest

from errors import refused
from opticnerve.web import guard
from opticnerve.web.guard import LOCAL_NAMES, Guard, Logins, check_address, read_secrets
from opticnerve.web.listen import listen


async def _pages(scope: Any, receive: Any, send: Any) -> None:
    """A page that reads its request to the end, and says how much came."""
    taken, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        taken += len(message.get("body", b""))
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(taken).encode()})


def request(entry: Guard, *, method: str = "GET", chunks: tuple[bytes, ...] = (b"",), **headers: str) -> Any:
    """Status (None: no answer), headers and body."""
    raw = {"host": "localhost:7860", **{k.replace("_", "-"): v for k, v in headers.items()}}
    scope = {"type": "http", "method": method, "headers": [(k.encode(), v.encode()) for k, v in raw.items()]}
    sent: list[MutableMapping[str, Any]] = []
    left = list(chunks)

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    asyncio.run(entry(scope, receive, send))
    if not sent:
        return None, {}, b""
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(m.get("body", b"") for m in sent[1:])


def make(*pairs: str, hosts: frozenset[str] | None = LOCAL_NAMES, body_bytes: int = 100) -> Guard:
    return Guard(_pages, logins=Logins(pairs), hosts=hosts, body_bytes=body_bytes)


def basic(pair: str) -> str:
    return "Basic " + base64.b64encode(pair.encode()).decode()


def test_answers_forbid_the_browser_to_fetch_from_elsewhere() -> None:
    status, headers, _ = request(make())
    assert status == 200
    policy = headers[b"content-security-policy"].decode()
    assert "default-src 'self'" in policy
    assert "http" not in policy
    assert headers[b"x-content-type-options"] == b"nosniff"


@pytest.mark.parametrize("host", ["localhost:7860", "127.0.0.1", "[::1]:7860", "LOCALHOST"])
def test_names_of_this_machine_are_answered(host: str) -> None:
    assert request(make(), host=host)[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:7860", ""])
def test_other_names_are_refused_without_a_login(host: str) -> None:
    assert request(make(), host=host)[0] == 403
    assert request(make(hosts=None), host=host)[0] == 200


def test_a_login_is_wanted_and_must_be_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "WRONG_SECONDS", 0)
    entry = make("me:correct horse", "you:battery staple", hosts=None)
    status, headers, _ = request(entry)
    assert status == 401
    assert headers[b"www-authenticate"].startswith(b"Basic")
    assert request(entry, authorization=basic("me:correct horse"))[0] == 200
    assert request(entry, authorization=basic("you:battery staple"))[0] == 200
    for wrong in (basic("me:battery staple"), basic("me:"), "Basic !!!", "Bearer correct horse", "Basic", "Basic ぬ"):
        assert request(entry, authorization=wrong)[0] == 401


@pytest.mark.parametrize("pair", ["no colon here", ":password1", "me:short"])
def test_a_login_that_is_none_is_an_error_that_says_how_to_make_one(pair: str) -> None:
    with refused("wrong-type", "user:password"):
        Logins([pair])


def test_a_request_that_another_site_makes_is_refused() -> None:
    assert request(make(), method="POST", origin="http://localhost:7860")[0] == 200
    for origin in ("https://evil.example", "http://localhost:1", "null"):
        assert request(make(), method="POST", origin=origin)[0] == 403


def test_too_long_a_body_is_refused_by_its_length_and_as_it_comes() -> None:
    assert request(make(), method="POST", chunks=(b"x" * 60, b"x" * 40))[2] == b"100"
    assert request(make(), method="POST", content_length="101")[0] == 413
    assert request(make(), method="POST", chunks=(b"x" * 60, b"x" * 41))[0] is None


def test_another_address_wants_a_login() -> None:
    with refused("missing-field", "0.0.0.0", "OPTICNERVE_UI_LOGIN"):
        check_address("0.0.0.0", Logins(()), no_auth=False)
    assert check_address("0.0.0.0", Logins(()), no_auth=True) is None
    assert check_address("0.0.0.0", Logins(["me:password"]), no_auth=False) is None
    assert check_address("localhost", Logins(()), no_auth=False) == LOCAL_NAMES


def test_a_taken_port_is_an_error_that_names_the_option() -> None:
    with listen("127.0.0.1", 0) as taken, refused("network", taken.getsockname()[1], "--port"):
        listen("127.0.0.1", taken.getsockname()[1])


def test_logins_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "logins"
    file.write_text("# ours\nme:password1\n\n  you:password2  \n")
    assert read_secrets(file) == ["me:password1", "you:password2"]
