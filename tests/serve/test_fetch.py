"""Pictures from elsewhere: allow-listed hosts only, public addresses only, no redirect, no second look at the name."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from served import Live, chat, image_url

from opticnerve.common import fetch as module
from opticnerve.common.fetch import is_public
from opticnerve.data.media.files import decode_data_url
from opticnerve.serve.errors import ApiError
from opticnerve.serve.media import fetch

CUT = threading.Event()  # the client of /slow has hung up
PICTURE = decode_data_url(image_url(1))


class Pages(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.startswith("/redirect"):
            self.send_response(302)
            self.send_header("Location", "http://[" if "broken" in self.path else "http://169.254.169.254/latest/")
            self.end_headers()
            return
        if self.path == "/missing" or "X-Evil" in self.headers:
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        if self.path == "/slow":
            try:
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            except OSError:
                CUT.set()
        else:
            self.wfile.write(PICTURE if self.path.startswith("/picture") else b"0" * 100_000)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"localhost:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def get(url: str, *hosts: str, seconds: float = 5.0) -> bytes:
    return fetch(url, hosts=hosts, max_bytes=20_000, seconds=seconds, param="p")


def refusal(url: str, *hosts: str, **options: Any) -> str:
    with pytest.raises(ApiError) as e:
        get(url, *hosts, **options)
    assert e.value.status == 400
    return e.value.message


@pytest.fixture
def as_if_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback counts as the open internet: there is no other network in a test."""
    monkeypatch.setattr(module, "is_public", lambda address: True)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "224.0.0.1", "255.255.255.255", "192.0.2.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:1::", "::7f00:1", "fec0::1",
    ],
)  # fmt: skip
def test_addresses_within(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_of_the_open_internet(address: str) -> None:
    assert is_public(address)


def test_an_allowed_host_on_a_private_address_is_refused(host: str) -> None:
    assert "not public" in refusal(f"http://{host}/picture", host)
    port = host.split(":")[1]
    for name in ("127.0.0.1", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]"):
        bare = name.strip("[]")
        assert "not public" in refusal(f"http://{name}:{port}/picture", f"{bare}:{port}")


@pytest.mark.usefixtures("as_if_public")
class TestOfAPublicHost:
    def test_a_picture(self, host: str) -> None:
        assert get(f"http://{host}/picture?size=1", host) == PICTURE

    def test_hosts_that_are_not_allowed(self, host: str) -> None:
        port = host.split(":")[1]
        assert "does not fetch" in refusal(f"http://{host}/picture")
        assert "does not fetch" in refusal(f"http://{host}/picture", "localhost")  # another port than 80 and 443
        assert "does not fetch" in refusal(f"http://localhost.evil.example:{port}/", host)
        assert "does not fetch" in refusal(f"http://127.0.0.1:{port}/picture", host)
        assert "user's name" in refusal(f"http://{host}@evil.example/", host)
        assert "no address" in refusal("http://localhost:99999/", host)
        assert "no address" in refusal("http://[::1/", host)

    def test_redirects(self, host: str) -> None:
        assert "redirects" in refusal(f"http://{host}/redirect", host)
        assert "redirects" in refusal(f"http://{host}/redirect/broken", host)

    def test_errors_sizes_and_times(self, host: str) -> None:
        assert "answered 404" in refusal(f"http://{host}/missing", host)
        assert "20,000 bytes" in refusal(f"http://{host}/big", host)
        assert "within 0.3 s" in refusal(f"http://{host}/slow", host, seconds=0.3)
        assert CUT.wait(30)

    def test_header_injection(self, host: str) -> None:
        assert get(f"http://{host}/picture\r\nX-Evil: 1", host) == PICTURE  # all of it the path
        assert get(f"http://{host}/picture a", host) == PICTURE  # asked for as /picture%20a

    def test_signs_beyond_ascii(self, host: str) -> None:
        assert get(f"http://{host}/picture/猫.png?q=é", host) == PICTURE

    def test_a_connection_that_stands_at_the_last_moment(self, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
        connect = socket.create_connection

        def late(*where: Any, **options: Any) -> socket.socket:
            time.sleep(0.3)
            return connect(*where, **options)

        monkeypatch.setattr(socket, "create_connection", late)
        CUT.clear()
        assert "within 0.2 s" in refusal(f"http://{host}/slow", host, seconds=0.2)
        assert not CUT.is_set()  # not even asked


def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([["93.184.216.34"], ["127.0.0.1"]])  # the name service changes its mind
    asked, reached = [], []

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in next(answers)]

    def connect(address: tuple[str, int], *_: Any, **__: Any) -> Any:
        reached.append(address)
        raise ConnectionRefusedError("nobody there")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", connect)
    assert "failed" in refusal("http://pictures.example/1.png", "pictures.example")
    assert asked == ["pictures.example"]
    assert reached == [("93.184.216.34", 80)]


def test_one_private_address_among_several_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, 80)) for a in ("93.184.216.34", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert "not public" in refusal("http://pictures.example/1.png", "pictures.example")


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/", "https://example.org/1.png", "HTTP://LOCALHOST/", "ftp://a/", "gopher://a"]
)
def test_the_server_fetches_nothing_by_default(url: str, live: Live) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    answer = live.post(**chat("q", part))
    assert answer.status_code == 400
    assert "data URL" in answer.json()["error"]["message"]
