"""A server that is told to stop: nobody new, running answers end, exit code 0."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import LIMITS, chat, folder_of, image_url, serving, until

from errors import refused
from opticnerve.models.vlm.build import Dock


def test_sigterm(both: Dock, tmp_path: Path) -> None:
    folder = folder_of(both, tmp_path / "tiny")
    command = [sys.executable, "-m", "opticnerve_launch", "serve", str(folder), "--port", "0", "--slots", "4"]
    environment = {**os.environ, "OPTICNERVE_API_KEY": "a-key-of-the-environment", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines: list[str] = []
            while not lines or "http://" not in lines[-1]:
                line = process.stderr.readline()
                assert line, "".join(lines)
                lines.append(line)
            url = re.findall(r"http://\S+(?=/v1)", lines[-1])[0]
            headers = {"authorization": "Bearer a-key-of-the-environment"}
            assert httpx.get(f"{url}/v1/models").status_code == 401
            secret = {"type": "image_url", "image_url": {"url": image_url(1)}}
            body = chat("never to be logged", secret) | {"stream": True, "max_tokens": 200}
            # However fast the model is, one request runs until the test lets it: the end of its body is kept back.
            whole, kept_back = json.dumps(chat("hello") | {"max_tokens": 2}).encode(), threading.Event()

            def halves() -> Iterator[bytes]:
                yield whole[:20]
                kept_back.wait(60)
                yield whole[20:]

            with (
                httpx.Client(base_url=url, headers=headers, timeout=120) as client,
                ThreadPoolExecutor(1) as pool,
            ):
                json_type = {"content-type": "application/json", **headers}
                held = pool.submit(
                    httpx.post, f"{url}/v1/chat/completions", content=halves(), headers=json_type, timeout=120
                )
                try:
                    assert until(lambda: "opticnerve_admitted_requests 1.0" in client.get("/metrics").text)
                    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                        assert answer.status_code == 200
                        coming = answer.iter_lines()
                        next(coming)
                        assert client.get("/health").json()["status"] == "ok"
                        process.send_signal(signal.SIGTERM)
                        assert until(lambda: client.get("/health").json()["status"] == "stopping")
                        late = client.get("/v1/models")
                        assert late.status_code == 503
                        assert "retry-after" in late.headers
                        *_, last = (line for line in coming if line)
                finally:
                    kept_back.set()
                assert held.result().json()["choices"][0]["message"]["content"]
            assert last == "data: [DONE]"
            assert process.wait(timeout=60) == 0
            log = "".join(lines) + process.stderr.read()
        finally:
            process.kill()
    assert re.search(r"id=chatcmpl-\w+ prompt=\d+ completion=\d+ finish=\S+ status=200 seconds=\d", log)
    assert "never" not in log
    assert "environment" not in log
    assert "Traceback" not in log


def test_answers_that_outlast_the_grace_are_cut_off(make_dock: Callable[..., Dock]) -> None:
    made = make_dock()
    limits = replace(LIMITS, slots=1, grace_seconds=0.2)
    with serving(made.model, made.processor, limits=limits) as live, ThreadPoolExecutor(2) as pool:
        step = live.service.scheduler.batch.step

        def slowly(*tokens: Any) -> Any:
            time.sleep(0.05)
            return step(*tokens)

        live.service.scheduler.batch.step = slowly  # type: ignore[method-assign]
        running = pool.submit(live.post, max_tokens=400)
        assert until(lambda: live.metric("running_answers") == 1)
        waiting = pool.submit(live.post, max_tokens=400)
        assert until(lambda: live.metric("admitted_requests") == 2)
        live.server.stop()
        assert running.result().json()["choices"][0]["finish_reason"] == "length"
        assert running.result().json()["usage"]["completion_tokens"] < 400
        assert waiting.result().status_code == 503


class TestTheCommand:
    """What is wrong with the command line is said before a model is loaded."""

    @pytest.fixture
    def refused(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
        from opticnerve.cli.main import main

        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.delenv("OPTICNERVE_API_KEY", raising=False)

        def run(*words: str) -> str:
            with pytest.raises(SystemExit) as left:
                main(["serve", "there-is-no-such-model", *words])
            assert left.value.code == 1
            return capsys.readouterr().err

        return run

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("--host", "0.0.0.0"), "--api-key"),
            (("--api-key", "short"), "8 or more"),
            (("--allow-media", "/there/is/no/folder"), "is no folder"),
            (("--allow-url-host", "http://example.org"), "HOST:PORT"),
            (("--api-key-file", "/there/is/no/file"), "No such file"),
        ],
    )
    def test_options(self, words: tuple[str, ...], message: str, refused: Callable[..., str]) -> None:
        assert message in refused(*words)

    def test_a_port_that_is_taken(self, refused: Callable[..., str]) -> None:
        from opticnerve.web.listen import listen

        with listen("127.0.0.1", 0) as taken:
            assert "another --port" in refused("--port", str(taken.getsockname()[1]))

    def test_more_context_than_the_model_has(self, both: Dock) -> None:
        from opticnerve.serve.prompts import check_context

        assert check_context(both.model, None) == 512
        assert check_context(both.model, 100) == 100
        with refused("out-of-range", "513", "512"):
            check_context(both.model, 513)

    def test_a_key_file(self, tmp_path: Path) -> None:
        from opticnerve.web.guard import read_secrets

        (tmp_path / "keys").write_text("# of the team\nfirst-key\n\n second-key \n")
        assert read_secrets(tmp_path / "keys") == ["first-key", "second-key"]
