"""A hub on the loopback: the few HTTP calls of `huggingface_hub` and `datasets`, answered from folders.

`serving()` serves; a `CommandLine` is a process of its own, whose environment points there, and runs commands one after
the other. A repository's `revisions` are folders; what goes wrong with it (`gated`, `breaks`, `lies`) is set on it, and
`hub.asked` lists what was asked for.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_loopback"  # of a user who has accepted every licence


@dataclass
class Repository:
    """`revisions`: name → folder, `main` among them. `gated`: wants TOKEN, as `private` does. `breaks`: file → how many
    answers end half-way. `lies`: file → other bytes that are sent under the true file's hash."""

    revisions: dict[str, Path]
    gated: bool = False
    private: bool = False
    breaks: dict[str, int] = field(default_factory=dict)
    lies: dict[str, bytes] = field(default_factory=dict)

    def commit(self, revision: str) -> str | None:
        """A name that stands for the contents: 40 hexadecimal digits."""
        by_commit = {self._hash(folder): folder for folder in self.revisions.values()}
        if revision in by_commit:
            return revision
        return self._hash(self.revisions[revision]) if revision in self.revisions else None

    def folder(self, commit: str) -> Path:
        return next(f for f in self.revisions.values() if self._hash(f) == commit)

    @staticmethod
    def _hash(folder: Path) -> str:
        total = hashlib.sha1()
        for file in files(folder):
            total.update(f"{file.relative_to(folder)}|{file.stat().st_size}|{file.stat().st_mtime_ns}".encode())
        return total.hexdigest()


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def is_large(file: Path) -> bool:
    """Whether a hub would keep it in LFS, by its SHA-256."""
    return file.suffix in (".safetensors", ".bin", ".parquet", ".gguf")


def oid(file: Path) -> str:
    content = file.read_bytes()
    if is_large(file):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Hub:
    """`repositories`: ("models" or "datasets", OWNER/NAME) → what is there."""

    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    address: str = ""
    uploads: Path | None = None
    """Where what is pushed is kept: a folder for each repository, and the blobs."""

    def add(self, name: str, folder: str | Path, *, kind: str = "models", **options: Any) -> Repository:
        made = Repository({"main": Path(folder)}, **options)
        self.repositories[kind, name] = made
        return made

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """What a process is told so that this is its hub, `home` its cache, and it looks nowhere else."""
        return {
            "HF_ENDPOINT": self.address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "NO_PROXY": "127.0.0.1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": "", "HF_HUB_OFFLINE": "0",
            **more,
        }  # fmt: skip

    def point_here(self, patch: pytest.MonkeyPatch, home: Path) -> None:
        """The same for this process, in which huggingface_hub is imported already."""
        from huggingface_hub import constants

        for name, value in self.environment(home, HF_TOKEN=TOKEN).items():
            patch.setenv(name, value)
        patch.setattr(constants, "ENDPOINT", self.address)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        posted = self.rfile.read(length)
        if self.hub.uploads is None or not self._push(urlsplit(self.path).path, posted):
            self._answer(body=True, posted=posted)

    def do_PUT(self) -> None:
        assert self.hub.uploads is not None
        content = self.rfile.read(int(self.headers["Content-Length"]))
        (self.hub.uploads / hashlib.sha256(content).hexdigest()).write_bytes(content)
        self._json({}, body=True)

    def _push(self, path: str, posted: bytes) -> bool:
        """The calls of an upload; False where it is another."""
        assert self.hub.uploads is not None
        found = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(preupload|commit)/main", path)
        batch = re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path)
        if not (found or batch or path in ("/api/repos/create", "/api/validate-yaml")):
            return False
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []}, body=True)
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._error(401, "", body=True)
        elif path == "/api/repos/create":
            asked = json.loads(posted)
            name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            name = name if "/" in name else f"me/{name}"
            (self.hub.uploads / name).mkdir(parents=True, exist_ok=True)
            self.hub.add(name, self.hub.uploads / name)
            self._json({"url": f"{self.hub.address}/{name}"}, body=True)
        elif batch:
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.hub.address}/upload/{o['oid']}"}}}
                for o in json.loads(posted)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects}, body=True)
        elif found and found[2] == "preupload":
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if is_large(Path(f["path"])) else "regular",
                 "shouldIgnore": False, "oid": None} for f in json.loads(posted)["files"]
            ]  # fmt: skip
            self._json({"files": modes}, body=True)
        elif found:
            for line in map(json.loads, filter(None, posted.splitlines())):
                value = line["value"]
                if line["key"] in ("file", "lfsFile"):
                    place = self.hub.uploads / found[1] / value["path"]
                    place.parent.mkdir(parents=True, exist_ok=True)
                    kept = line["key"] == "lfsFile" and (self.hub.uploads / value["oid"]).read_bytes()
                    place.write_bytes(kept or base64.b64decode(value["content"]))
            commit = self.hub.repositories["models", found[1]].commit("main")
            url = f"{self.hub.address}/{found[1]}/commit/{commit}"
            self._json({"commitUrl": url, "commitOid": commit, "pullRequestUrl": None}, body=True)
        return True

    def _answer(self, *, body: bool, posted: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/api/(models|datasets)/([\w.-]+/[\w.-]+)(?:/([\w-]+)(?:/(.+))?)?", path):
            kind, name, call, rest = found.groups()
            self._api(kind, name, call or "revision", rest or "main", posted, body)
        elif found := re.fullmatch(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/([^/]+|refs/pr/\d+)/(.+)", path):
            kind, name, revision, file = found.groups()
            self._file("datasets" if kind else "models", name, revision, file, body)
        else:
            self._error(404, "", body=body)

    def _repository(
        self, kind: str, name: str, revision: str, *, contents: bool, body: bool
    ) -> tuple[Repository, str] | None:
        """The repository and the commit, or the refusal is sent."""
        found = self.hub.repositories.get((kind, name))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if found is None or (found.private and token != TOKEN):
            # As the hub does: without a token nobody learns whether a repository is there.
            self._error(404 if token else 401, "RepoNotFound", body=body)
        elif found.gated and contents and token != TOKEN:
            self._error(403 if token else 401, "GatedRepo", body=body)
        elif (commit := found.commit(revision)) is None:
            self._error(404, "RevisionNotFound", body=body)
        else:
            return found, commit
        return None

    def _api(self, kind: str, name: str, call: str, rest: str, posted: bytes, body: bool) -> None:
        pull = re.match(r"refs/pr/\d+", rest)
        revision, _, inner = (pull[0], "", rest[pull.end() + 1 :]) if pull else rest.partition("/")
        found = self._repository(kind, name, revision, contents=call == "auth-check", body=body)
        if found is None:
            return
        repository, commit = found
        if call == "discussions":
            self._pull_requests(repository, body)
            return
        folder = repository.folder(commit)
        entries = [_entry(f, folder) for f in files(folder)]
        if call == "tree":
            if not (folder / inner).is_dir():
                self._error(404, "EntryNotFound", commit, body=body)
                return
            below = sorted(p for p in (folder / inner).rglob("*"))
            if "recursive=true" not in urlsplit(self.path).query.lower():
                below = [p for p in below if p.parent == folder / inner]
            self._json([_entry(p, folder) for p in below], body)
        elif call == "paths-info":
            wanted = set(re.findall(r"[\w./-]+", unquote(posted.decode())))
            self._json([e for e in entries if e["path"] in wanted], body)
        else:
            siblings = [{"rfilename": e["path"]} for e in entries]
            self._json(
                {"id": name, "sha": commit, "private": repository.private, "gated": "auto" if repository.gated else False,
                 "siblings": siblings, "tags": [], "downloads": 0}, body,
            )  # fmt: skip

    def _pull_requests(self, repository: Repository, body: bool) -> None:
        """Each revision `refs/pr/N` is one that offers safetensors."""
        found = [
            {"num": int(name.rpartition("/")[2]), "title": "Adding `safetensors` variant of this model", "status": "open",
             "author": {"name": "SFconvertbot"}, "isPullRequest": True, "repo": {"name": "", "type": "model"},
             "createdAt": "2026-01-01T00:00:00.000Z"}
            for name in repository.revisions if name.startswith("refs/pr/")
        ]  # fmt: skip
        self._json({"discussions": found, "count": len(found), "start": 0}, body)

    def _file(self, kind: str, name: str, revision: str, path: str, body: bool) -> None:
        found = self._repository(kind, name, revision, contents=True, body=body)
        if found is None:
            return
        repository, commit = found
        file = repository.folder(commit) / path
        if not file.is_file():
            self._error(404, "EntryNotFound", commit, body=body)
            return
        content = file.read_bytes()
        if body:
            content = repository.lies.get(path, content)
        start = 0
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start = int(asked[1])
            end = int(asked[2]) + 1 if asked[2] else len(content)
            total, content = len(content), content[start:end]
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{start + len(content) - 1}/{total}")
        self.send_header("ETag", f'"{oid(file)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not body:
            return
        if repository.breaks.get(path, 0) > 0:
            repository.breaks[path] -= 1
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(content)

    def _json(self, value: Any, body: bool) -> None:
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if body:
            self.wfile.write(text)

    def _error(self, status: int, code: str, commit: str = "", *, body: bool) -> None:
        text = json.dumps({"error": code}).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if body:
            self.wfile.write(text)


def _entry(file: Path, folder: Path) -> dict[str, Any]:
    if file.is_dir():
        return {"type": "directory", "oid": "0" * 40, "size": 0, "path": file.relative_to(folder).as_posix()}
    size = file.stat().st_size
    entry: dict[str, Any] = {
        "type": "file", "oid": oid(file)[:40], "size": size, "path": file.relative_to(folder).as_posix()
    }  # fmt: skip
    return entry | ({"lfs": {"oid": oid(file), "size": size, "pointerSize": 134}} if is_large(file) else {})


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (_Answers,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


class Done(NamedTuple):
    """How a command ended: exit code and what it wrote."""

    code: int
    out: str
    err: str


class CommandLine:
    """A process that runs `opticnerve …`, one command after the other, with `hub` as its hub."""

    def __init__(self, hub: Hub, home: Path, folder: Path, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **hub.environment(home), **environment},
        )  # fmt: skip

    def __call__(self, *words: str, **environment: str) -> Done:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([words, environment]) + "\n")
        self._process.stdin.flush()
        return Done(*json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate(timeout=60)  # closes its ends, too


def _obey() -> None:
    """Run the commands that stand on stdin, a line each."""
    from opticnerve.cli.main import main

    reports = sys.stdout
    for line in sys.stdin:
        words, environment = json.loads(line)
        before = dict(os.environ)
        os.environ.update(environment)
        out, err, code = io.StringIO(), io.StringIO(), 0
        with redirect_stdout(out), redirect_stderr(err):
            try:
                main(words)
            except SystemExit as left:
                code = int(left.code or 0)
            except BaseException:
                code = -1
                traceback.print_exc()
        os.environ.clear()
        os.environ.update(before)
        reports.write(json.dumps([code, out.getvalue(), err.getvalue()]) + "\n")
        reports.flush()


if __name__ == "__main__":
    _obey()
