"""`opticnerve ui`: the browser interface."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from opticnerve.cli.output import TrustFlag, examples, quiet_libraries

EPILOG = examples(
    "opticnerve ui starter",
    "opticnerve ui runs/demo runs/mine --language ja",
    "OPTICNERVE_UI_LOGIN=me:… opticnerve ui starter --host 0.0.0.0",
    note="docs/ui.md shows the page, and how it protects itself.",
)
_MODELS_HELP = "Models to offer, as `opticnerve ask` takes them; the stages of a run are offered with it."


def ui(
    models: Annotated[list[str] | None, typer.Argument(help=_MODELS_HELP, show_default="starter")] = None,
    runs: Annotated[Path, typer.Option(help="The folder whose runs can be browsed, and where new ones go.")] = Path(
        "runs"
    ),
    host: Annotated[str, typer.Option(help="The address to listen on; this machine alone by default.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 7860,
    language: Annotated[
        str | None, typer.Option(help="Begin in English (en) or Japanese (ja).", show_default="the browser's")
    ] = None,
    login_file: Annotated[
        Path | None, typer.Option(help="A file with user:password on each line. OPTICNERVE_UI_LOGIN holds one too.")
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Let others in without a login.")] = False,
    max_upload: Annotated[int, typer.Option(min=1, help="Bytes of a picture's file.")] = 20_000_000,
    max_pixels: Annotated[int, typer.Option(min=1, help="Of a picture.")] = 64_000_000,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer that can be asked for.")] = 512,
    queue: Annotated[int, typer.Option(min=1, help="Questions that may wait; one is answered at a time.")] = 16,
    keep: Annotated[int, typer.Option(min=1, help="Models kept in memory.")] = 3,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …", show_default="the first accelerator")] = None,
    trust_remote_code: TrustFlag = False,
) -> None:
    """Open a page in the browser: chat, see where a model looks, compare, browse runs, train. Ctrl-C ends it."""
    import importlib.util
    import os

    from opticnerve.cli.guard import emit, terminate_like_ctrl_c
    from opticnerve.types import OpticNerveError, to_install
    from opticnerve.web.listen import listen, read_secrets

    for package in ("gradio", "fastapi", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise OpticNerveError(f"{package} is not installed: {to_install('opticnerve[ui]')}")
    from opticnerve.ui.app import listen_and_serve, private_folder, site
    from opticnerve.ui.i18n import Translations
    from opticnerve.ui.limits import Limits
    from opticnerve.ui.models import Models
    from opticnerve.web.guard import Logins
    from opticnerve.web.place import address

    # All that can be wrong is found before the page is built.
    if language is not None:
        Translations(language)
    pairs = read_secrets(login_file) if login_file else []
    pairs += [pair] if (pair := os.environ.get("OPTICNERVE_UI_LOGIN")) else []
    logins = Logins(pairs)
    hosts = address(host, logins, no_auth=no_auth)
    limits = Limits(
        upload_bytes=max_upload, pixels=max_pixels, waiting=queue, answer_tokens=max_new_tokens, models=keep
    )
    socket = listen(host, port)
    quiet_libraries()
    terminate_like_ctrl_c()
    offered = Models(
        models or ["starter"], runs=runs, keep=limits.models, device=device, trust_remote_code=trust_remote_code
    )
    with private_folder():
        app = site(offered, runs, limits, language=language, logins=logins, hosts=hosts)
        place = f"[{host}]" if ":" in host else host
        emit(f"open http://{place}:{socket.getsockname()[1]}/ in a browser; Ctrl-C ends the page")
        listen_and_serve(app, socket)
