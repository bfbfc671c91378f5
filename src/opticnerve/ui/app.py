"""The page, its two languages, and the server around them."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opticnerve.ui.i18n import LANGUAGES, Translations, preferred
from opticnerve.ui.models import Models, PageLimits
from opticnerve.web.guard import App, Guard, Logins

ICON = (
    b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">'
    b'<ellipse cx="16" cy="16" rx="15" ry="9" fill="#0f766e"/>'
    b'<circle cx="16" cy="16" r="5" fill="white"/></svg>'
)


def _theme() -> Any:
    """Gradio's own, without fonts to fetch and with buttons dark enough to read white on (WCAG 1.4.3)."""
    import gradio as gr

    return gr.themes.Default(primary_hue="teal", font=["sans-serif"], font_mono=["monospace"]).set(
        button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700", button_primary_text_color="white",
        button_primary_text_color_dark="white",
    )  # fmt: skip


def page(words: Translations, models: Models, runs: Path, limits: PageLimits) -> Any:
    """A `gr.Blocks` in one language. No function of it can be called as an API, whatever its tab says."""
    import gradio as gr

    from opticnerve.ui.chat_tab import chat_tab
    from opticnerve.ui.compare import compare_tab
    from opticnerve.ui.runs_tab import runs_tab
    from opticnerve.ui.train_tab import train_tab

    with gr.Blocks(title=words("title"), analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        gr.HTML(_top(words))
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab(words("tab_chat"), id="chat") as chat:
                dropdowns = [chat_tab(words, models, limits)]
            with gr.Tab(words("tab_compare"), id="compare") as compared:
                dropdowns += compare_tab(words, models, limits)
            with gr.Tab(words("tab_runs"), id="runs"):
                runs_tab(words, runs)
            with gr.Tab(words("tab_train"), id="train"):
                train_tab(words, runs)

        def refresh() -> list[Any]:
            choices = models.choices()  # a run may have ended since
            return [gr.update(choices=choices) for _ in dropdowns]

        for event in (blocks.load, chat.select, compared.select):
            event(refresh, None, dropdowns, show_progress="hidden")
    for function in blocks.fns.values():
        function.api_visibility = "private"
    blocks.queue(max_size=limits.waiting, api_open=False)
    return blocks


def _top(words: Translations) -> str:
    others = "".join(
        f'<a href="../{language}/" lang="{language}" hreflang="{language}">{name}</a>'
        for language, name in LANGUAGES.items()
        if language != words.language
    )
    return (
        f'<header class="top"><h1>{words("title")}</h1><p>{words("subtitle")}</p>'
        f'<nav aria-label="{words("language")}">{others}</nav></header>'
    )


def site(
    models: Models, runs: Path, limits: PageLimits, *, language: str | None = None, logins: Logins | None = None,
    hosts: frozenset[str] | None = None,
) -> App:  # fmt: skip
    """All pages behind their guard, as an ASGI application. `/` leads to the browser's language, or to `language`."""
    import gradio as gr
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse, RedirectResponse, Response

    pages = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    def choose(request: Any) -> RedirectResponse:
        chosen = language or preferred(request.headers.get("accept-language", ""))
        return RedirectResponse(f"{chosen}/", headers={"vary": "accept-language"})

    pages.add_route("/", choose)
    # Browsers and gradio's page ask for these, wherever the page is mounted.
    pages.add_route("/favicon.ico", lambda _: Response(ICON, media_type="image/svg+xml"))
    pages.add_route("/manifest.json", lambda _: JSONResponse({"name": "opticnerve", "display": "browser"}))
    for spoken in LANGUAGES:
        gr.mount_gradio_app(
            pages, page(Translations(spoken), models, runs, limits), f"/{spoken}", footer_links=[], run_history=False,
            allowed_paths=[], max_file_size=limits.upload_bytes, show_error=True, ssr_mode=False, pwa=False,
            mcp_server=False, enable_monitoring=False, theme=_theme(), css_paths=Path(__file__).with_name("page.css"),
            js=f"() => {{ document.documentElement.lang = '{spoken}'; }}",
        )  # fmt: skip
    # A form adds its own lines around a file.
    return Guard(pages, logins=logins or Logins(()), hosts=hosts, body_bytes=limits.upload_bytes + 1_000_000)


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """Where uploads and drawings lie while the page is served: a folder that others cannot read, gone afterwards.

    To be entered before gradio is imported, which reads these names then.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with tempfile.TemporaryDirectory(prefix="opticnerve-ui-", ignore_cleanup_errors=True) as folder:
        before = os.environ.get("GRADIO_TEMP_DIR")
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield Path(folder)
        finally:
            os.environ.pop("GRADIO_TEMP_DIR")
            if before is not None:
                os.environ["GRADIO_TEMP_DIR"] = before


def listen_and_serve(app: App, at: socket.socket) -> None:
    """Until SIGTERM or Ctrl-C. Answers that are being written then are cut off after two seconds."""
    import logging

    import uvicorn

    class PageServer(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # An open page always waits for news; that it is cut off now is no error to show a traceback of.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app, ws="none", lifespan="on", access_log=False, log_level="warning", server_header=False,
        timeout_graceful_shutdown=2,
    )  # fmt: skip
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again once all is closed
        PageServer(config).run(sockets=[at])
