"""`opticnerve ui` on the command line: what it refuses, and that Ctrl-C ends it well."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from opticnerve.cli.main import app


def refused(*arguments: str, **environment: str) -> str:
    """What the command says on stderr when it ends with 1."""
    found = CliRunner().invoke(app, ["ui", *arguments], env=environment)
    assert found.exit_code == 1, found.output
    return " ".join(found.stderr.split())


def test_without_gradio_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "gradio" else find(name, *more)
    )
    assert "pip install 'opticnerve[ui]'" in refused()


def test_another_address_wants_a_login() -> None:
    assert "OPTICNERVE_UI_LOGIN" in refused("--host", "0.0.0.0")


def test_a_login_too_short_is_refused() -> None:
    assert "8 or more characters" in refused(OPTICNERVE_UI_LOGIN="me:short")


def test_an_unknown_language_is_refused() -> None:
    assert "en and ja" in refused("--language", "fr")


def test_a_model_that_is_none_is_refused_before_the_page_opens(tmp_path: Path) -> None:
    assert "no model" in refused(str(tmp_path), "--port", "0")


def test_gradio_is_not_imported_for_help() -> None:
    code = (
        "import sys, opticnerve_launch\n"
        "sys.argv = ['opticnerve', 'ui', '--help']\n"
        "try: opticnerve_launch.main()\n"
        "except SystemExit: pass\n"
        "assert 'gradio' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_it_serves_until_it_is_told_to_stop_and_leaves_nothing_behind(
    two_models: list[str], tmp_path: Path, sent: signal.Signals
) -> None:
    pytest.importorskip("gradio")
    environment: dict[str, Any] = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "opticnerve_launch", "ui", two_models[0], "--port", "0", "--runs", str(tmp_path)]
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        while not (found := re.search(r"http://127\.0\.0\.1:\d+/", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        opened = urllib.request.Request(found[0], headers={"Accept-Language": "ja"})
        with _patiently(opened) as answer:
            assert answer.url.endswith("/ja/")
            assert 'lang="en"' in answer.read().decode()
        assert list(tmp_path.glob("opticnerve-ui-*"))
        process.send_signal(sent)
        assert process.wait(timeout=120) == 0, log.read_text()
    finally:
        process.kill()
    assert "Traceback" not in log.read_text()
    assert not list(tmp_path.glob("opticnerve-ui-*"))


def _patiently(request: urllib.request.Request) -> Any:
    """The answer, once there is one: the address is told a moment before it answers."""
    for _ in range(100):
        try:
            return urllib.request.urlopen(request, timeout=60)
        except ConnectionError:
            time.sleep(0.2)
    raise AssertionError("nobody answers")
