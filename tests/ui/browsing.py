"""The page behind a real socket, and a real browser before it."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from opticnerve.ui.app import private_folder, site
from opticnerve.ui.models import Models, PageLimits
from opticnerve.web.guard import LOCAL_NAMES
from opticnerve.web.listen import listen

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run",
]  # fmt: skip


@contextmanager
def page_at(models: Models, runs: Path, limits: PageLimits) -> Iterator[str]:
    """The address of a page that is served until the block is left."""
    import uvicorn

    with private_folder():
        app = site(models, runs, limits, hosts=LOCAL_NAMES)
        at = listen("127.0.0.1", 0)
        server = uvicorn.Server(uvicorn.Config(app, ws="none", log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [at]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.05)
        yield f"http://127.0.0.1:{at.getsockname()[1]}/"
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()


@contextmanager
def chromium() -> Iterator[Any]:
    """Debian's Chromium or what else there is, headless; without one the test is skipped."""
    api = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(CHROMIUM)} is on the PATH")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=QUIET)
        yield browser
        browser.close()


@contextmanager
def visit(browser: Any, url: str, *, locale: str = "en-US", **options: Any) -> Iterator[Any]:
    """A loaded page in a context of its own; `foreign` collects what it asked of other hosts, `errors` its scripts'."""
    context = browser.new_context(locale=locale, **options)
    context.set_default_timeout(60_000)
    page = context.new_page()
    page.foreign, page.errors = [], []
    home = (url, "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(home) else page.foreign.append(request.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(url)
    page.wait_for_selector("#question textarea")
    yield page
    context.close()
