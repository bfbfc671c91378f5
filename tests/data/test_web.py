"""Pictures on the web: once, where a `media_cache` asks for them, a few side by side, and never from within this network
unless that is allowed."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from layouts import png, put

from errors import refused
from opticnerve.common import fetch
from opticnerve.common.cache import alone
from opticnerve.data.dataset.load import stream_data
from opticnerve.data.media import web
from opticnerve.recipe.loading import data_entry
from opticnerve.types import Conversation, DataError, TextPart


@dataclass
class Site:
    """A web server on this machine: what it was asked for, and how many requests it had at once."""

    url: str = ""
    asked: list[str] = field(default_factory=list)
    now: int = 0
    most: int = 0
    busy: list[int] = field(default_factory=list)  # how often it says that it is busy
    together: int = 1  # requests that wait for each other
    changed: threading.Condition = field(default_factory=threading.Condition)
    hold: threading.Event = field(default_factory=threading.Event)  # clear: nothing is answered


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    found = Site()
    found.hold.set()
    monkeypatch.setattr(web, "PAUSE", 0.0)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with found.changed:
                found.asked.append(self.path)
                found.now += 1
                found.most = max(found.most, found.now)
                found.changed.notify_all()
                found.changed.wait_for(lambda: found.most >= found.together, timeout=20)
            found.hold.wait(60)
            where, _, to = self.path.partition("?to=")
            status = 503 if found.busy and found.busy.pop() else 302 if to else 200 if where.endswith(".png") else 404
            self.send_response(status)
            if to:
                self.send_header("Location", to)
            if where == "/cut.png":
                self.send_header("Content-Length", "9999")
            self.end_headers()
            self.wfile.write(png() if status == 200 else b"no")
            with found.changed:
                found.now -= 1

        def log_message(self, *args: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


def tried(path: Path, **options: Any) -> tuple[list[Conversation], list[DataError]]:
    bad: list[DataError] = []
    return list(stream_data(data_entry({"path": str(path), **options}), on_error=bad.append)), bad


def written(folder: Path, *addresses: str) -> Path:
    put(folder / "d.tsv", "".join(f"caption {n}\t{address}\n" for n, address in enumerate(addresses)))
    return folder / "d.tsv"


@pytest.fixture
def local(tmp_path: Path) -> dict[str, Any]:
    return {"media_cache": str(tmp_path / "cache"), "allow_private_hosts": True}


def captions(found: list[Conversation]) -> list[str]:
    return [p.text for c in found for p in c.messages[-1].parts if isinstance(p, TextPart)]


def test_once_and_only_where_asked(tmp_path: Path, site: Site, local: dict[str, Any]) -> None:
    path = written(tmp_path, f"{site.url}/1.png", f"{site.url}/2.jpg")
    found, bad = tried(path)
    assert not found and not site.asked and {e.kind for e in bad} == {"url"} and "media_cache" in bad[0].remedy
    found, bad = tried(path, **local)
    assert [e.kind for e in bad] == ["url"] and "404" in bad[0].problem
    assert Path(str(found[0].images[0].source)).read_bytes() == png()
    tried(path, **local)
    assert sorted(site.asked) == ["/1.png", "/2.jpg", "/2.jpg"]


def test_a_few_at_once_in_the_order_of_the_file(tmp_path: Path, site: Site, local: dict[str, Any]) -> None:
    site.together = 2
    names = [f"/{n}.{'jpg' if n % 5 == 4 else 'png'}" for n in range(24)]
    found, bad = tried(written(tmp_path, *(site.url + name for name in names)), **local)
    assert captions(found) == [f"caption {n}" for n in range(24) if n % 5 != 4]
    assert [e.where.rpartition(":")[2] for e in bad] == ["5", "10", "15", "20"]
    assert 2 <= site.most <= web.OF_A_HOST


def test_one_picture_of_many_records_is_fetched_once(tmp_path: Path, site: Site, local: dict[str, Any]) -> None:
    found, _ = tried(written(tmp_path, *[f"{site.url}/1.png"] * 9), **local)
    assert (len(found), site.asked) == (9, ["/1.png"])


def test_whoever_waited_finds_what_another_fetched(tmp_path: Path, site: Site) -> None:
    """The lock is a file's, and so holds among processes as among threads."""
    address, folder = f"{site.url}/1.png", tmp_path / "cache"
    site.hold.clear()
    both = [
        threading.Thread(target=web.fetched, args=(address, folder, "image"), kwargs={"private": True})
        for _ in range(2)
    ]
    for thread in both:
        thread.start()
    both[0].join(0.1)
    site.hold.set()
    for thread in both:
        thread.join()
    assert site.asked == ["/1.png"]
    (file,) = folder.glob("*/*.png")
    web._SEEN.clear()  # another process, while a third fetches
    with alone(file.parent, "", ""):
        assert web.fetched(address, folder, "image", private=True) == file


def test_no_more_is_fetched_than_a_limit_nearly_wants(tmp_path: Path, site: Site, local: dict[str, Any]) -> None:
    found, _ = tried(written(tmp_path, *(f"{site.url}/{n}.png" for n in range(99))), limit=2, **local)
    assert len(found) == 2 and len(site.asked) <= 2 + 2 * web.AT_ONCE


def test_a_file_that_was_changed_is_fetched_again(tmp_path: Path, site: Site) -> None:
    file = web.fetched(f"{site.url}/1.png", tmp_path / "cache", "image", private=True)
    file.write_bytes(b"x" * len(png()))
    web._SEEN.clear()  # another process
    again = web.fetched(f"{site.url}/1.png", tmp_path / "cache", "image", private=True)
    assert again.read_bytes() == png() and len(site.asked) == 2


def test_a_host_that_is_busy_is_asked_again(tmp_path: Path, site: Site) -> None:
    site.busy = [0, 1, 1]
    assert web.fetched(f"{site.url}/1.png", tmp_path / "cache", "image", private=True).read_bytes() == png()
    assert len(site.asked) == 3


@pytest.mark.parametrize(("name", "most"), [("1.png", 10), ("cut.png", 1 << 20)])
def test_more_or_less_than_should_be(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch, name: str, most: int
) -> None:
    monkeypatch.setitem(web.MAX_MEDIUM, "image", most)
    with refused("url", error=DataError):
        web.fetched(f"{site.url}/{name}", tmp_path / "cache", "image", private=True)
    assert not [f for f in (tmp_path / "cache").rglob("*") if f.is_file() and f.name != "lock"]


class TestWithin:
    """This network's own hosts, to which a data file from elsewhere shall not send us."""

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "2130706433", "169.254.169.254", "10.0.0.1"])
    def test_are_not_asked(self, tmp_path: Path, site: Site, host: str) -> None:
        port = site.url.rpartition(":")[2]
        with refused("url", "allow_private_hosts", error=DataError):
            web.fetched(f"http://{host}:{port}/1.png", tmp_path / "cache", "image")
        assert not site.asked

    def test_by_no_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def resolve(host: str, port: int, **_: Any) -> list[Any]:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in ("93.184.216.34", "10.0.0.1")]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        with refused("url", "not public", error=DataError):
            web.fetched("https://pictures.example/1.png", tmp_path / "cache", "image")

    def test_nor_behind_a_redirect(self, tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fetch, "is_public", lambda address: address == "127.0.0.1")  # as if the site were
        for to in ("http://127.0.0.2/1.png", "http://169.254.169.254/latest", "file:///etc/passwd"):
            with refused("url", error=DataError):
                web.fetched(f"{site.url}/a.png?to={to}", tmp_path / "cache", "image")
        found = web.fetched(f"{site.url}/a.png?to=/1.png", tmp_path / "cache", "image")
        assert found.read_bytes() == png() and site.asked[-1] == "/1.png"
        with refused("url", "redirects", error=DataError):
            web.fetched(f"{site.url}/b.png?to={'/b.png?to=' * 9}/1.png", tmp_path / "cache", "image")
