"""`opticnerve serve` and `opticnerve ui`: an OpenAI-compatible API for one model, and the browser interface."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from opticnerve.cli.guard import emit, terminate_like_ctrl_c
from opticnerve.cli.options import MODEL_HELP, TrustFlag
from opticnerve.cli.output import examples, quiet_libraries
from opticnerve.types import OpticNerveError, to_install

SERVE_EPILOG = examples(
    "opticnerve serve starter",
    "opticnerve serve runs/demo --port 8080 --slots 16",
    "OPTICNERVE_API_KEY=… opticnerve serve runs/demo --host 0.0.0.0",
    note="docs/serving.md says what clients may ask for, and how the server protects itself.",
)
UI_EPILOG = examples(
    "opticnerve ui starter",
    "opticnerve ui runs/demo runs/mine --language ja",
    "OPTICNERVE_UI_LOGIN=me:… opticnerve ui starter --host 0.0.0.0",
    note="docs/ui.md shows the page, and how it protects itself.",
)
_MODELS_HELP = "Models to offer, as `opticnerve ask` takes them; the stages of a run are offered with it."
_RUNS_HELP = "The folder whose runs can be browsed, and where new ones go."
Host = Annotated[str, Option(help="The address to listen on; this machine alone by default.")]
Port = Annotated[int, Option(min=0, max=65535, help="0 takes a free one.")]
Device = Annotated[str | None, Option(help="cpu, cuda, …", show_default="the first accelerator")]


def serve(
    model: Annotated[str, Argument(help=MODEL_HELP)],
    host: Host = "127.0.0.1",
    port: Port = 8000,
    name: Annotated[str | None, Option(help="The model's name for clients.", show_default="MODEL")] = None,
    api_key: Annotated[
        list[str] | None,
        Option(help="A key that clients must send; may be given several times. OPTICNERVE_API_KEY holds one too."),
    ] = None,
    api_key_file: Annotated[Path | None, Option(help="A file with a key on each line.")] = None,
    no_auth: Annotated[bool, Option("--no-auth", help="Let others in without a key.")] = False,
    slots: Annotated[int, Option(min=1, help="Answers written at a time.")] = 8,
    queue: Annotated[int, Option(min=0, help="Requests that may wait beside them; more get 429.")] = 64,
    max_context: Annotated[
        int | None, Option(min=1, help="Tokens of prompt and answer.", show_default="the model's")
    ] = None,
    max_new_tokens: Annotated[int, Option(min=1, help="The longest answer where a request does not say.")] = 512,
    max_body: Annotated[int, Option(min=1, help="Bytes of a request, and of a picture from elsewhere.")] = 20_000_000,
    max_media: Annotated[int, Option(min=0, help="Pictures and sounds of a request.")] = 8,
    max_pixels: Annotated[int, Option(min=1, help="Of all pictures of a request together.")] = 64_000_000,
    max_audio_seconds: Annotated[float, Option(min=0.1, help="Of each sound.")] = 600.0,
    request_timeout: Annotated[float, Option(min=0.1, help="Seconds for one request.")] = 300.0,
    grace: Annotated[float, Option(min=0.0, help="Seconds for running answers once told to stop.")] = 30.0,
    allow_url_host: Annotated[
        list[str] | None, Option(help="HOST or HOST:PORT that pictures may be fetched from; several times.")
    ] = None,
    allow_media: Annotated[
        list[Path] | None, Option(help="A folder whose files may be named as file:///…; several times.")
    ] = None,
    device: Device = None,
    trust_remote_code: TrustFlag = False,
) -> None:
    """Serve a model to OpenAI's clients: answers, or a dual encoder's vectors. SIGTERM or Ctrl-C lets running answers
    end."""
    import logging

    try:
        from opticnerve.serve.limits import ServerLimits
        from opticnerve.serve.media import MediaSources
        from opticnerve.serve.server import Server, service_of
    except ModuleNotFoundError as e:
        raise OpticNerveError(
            f"{e.name} is not installed: {to_install('opticnerve[serve]')}", kind="not-installed"
        ) from e
    from opticnerve.inference.load import load_any
    from opticnerve.web.guard import Keys, check_address, read_secrets
    from opticnerve.web.listen import listen, url_of

    keys = [*(api_key or ()), *read_secrets(api_key_file), *_of_environment("OPTICNERVE_API_KEY")]
    # All that can be wrong is found before the model is loaded.
    hosts = check_address(host, Keys(keys), no_auth=no_auth)
    limits = ServerLimits(
        slots=slots, queue=queue, body_bytes=max_body, media=max_media, pixels=max_pixels,
        audio_seconds=max_audio_seconds, context=max_context, answer_tokens=max_new_tokens,
        request_seconds=request_timeout, grace_seconds=grace,
    )  # fmt: skip
    sources = MediaSources(tuple(allow_url_host or ()), tuple(allow_media or ()))
    socket = listen(host, port, stalled_seconds=60.0)

    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    log = logging.getLogger("opticnerve.serve")
    log.setLevel(logging.INFO)
    quiet_libraries()
    loaded, processor = load_any(model, device=device, trust_remote_code=trust_remote_code)
    service = service_of(
        loaded, processor, name=name or (Path(model).name if Path(model).is_absolute() else model),
        limits=limits, keys=keys, sources=sources, hosts=hosts,
    )  # fmt: skip
    log.info("%s at %s/v1", service.name, url_of(host, socket))
    Server(service).run(sockets=[socket])


def ui(
    models: Annotated[list[str] | None, Argument(help=_MODELS_HELP, show_default="starter, starter-receipts")] = None,
    runs: Annotated[Path, Option(help=_RUNS_HELP)] = Path("runs"),
    host: Host = "127.0.0.1",
    port: Port = 7860,
    language: Annotated[
        str | None, Option(help="Begin in English (en) or Japanese (ja).", show_default="the browser's")
    ] = None,
    login_file: Annotated[
        Path | None, Option(help="A file with user:password on each line. OPTICNERVE_UI_LOGIN holds one too.")
    ] = None,
    no_auth: Annotated[bool, Option("--no-auth", help="Let others in without a login.")] = False,
    max_upload: Annotated[int, Option(min=1, help="Bytes of a picture's file.")] = 20_000_000,
    max_pixels: Annotated[int, Option(min=1, help="Of a picture.")] = 64_000_000,
    max_new_tokens: Annotated[int, Option(min=1, help="The longest answer that can be asked for.")] = 512,
    queue: Annotated[int, Option(min=1, help="Questions that may wait; one is answered at a time.")] = 16,
    keep: Annotated[int, Option(min=1, help="Models kept in memory.")] = 3,
    device: Device = None,
    trust_remote_code: TrustFlag = False,
) -> None:
    """Open a page in the browser: chat, see where a model looks, compare, browse runs, train. Ctrl-C ends it."""
    import importlib.util

    for package in ("gradio", "fastapi", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise OpticNerveError(f"{package} is not installed: {to_install('opticnerve[ui]')}", kind="not-installed")
    from opticnerve.starter.demo import SHIPPED
    from opticnerve.ui.app import listen_and_serve, private_folder, site
    from opticnerve.ui.i18n import Translations
    from opticnerve.ui.models import Models, PageLimits
    from opticnerve.web.guard import Logins, check_address, read_secrets
    from opticnerve.web.listen import listen, url_of

    # All that can be wrong is found before the page is built.
    if language is not None:
        Translations(language)
    logins = Logins([*read_secrets(login_file), *_of_environment("OPTICNERVE_UI_LOGIN")])
    hosts = check_address(host, logins, no_auth=no_auth)
    limits = PageLimits(
        upload_bytes=max_upload, pixels=max_pixels, waiting=queue, answer_tokens=max_new_tokens, models=keep
    )
    socket = listen(host, port)
    quiet_libraries()
    terminate_like_ctrl_c()
    offered = Models(
        models or list(SHIPPED), runs=runs, keep=limits.models, device=device, trust_remote_code=trust_remote_code
    )
    with private_folder():
        app = site(offered, runs, limits, language=language, logins=logins, hosts=hosts)
        emit(f"open {url_of(host, socket)}/ in a browser; Ctrl-C ends the page")
        listen_and_serve(app, socket)


def _of_environment(name: str) -> list[str]:
    return [secret] if (secret := os.environ.get(name)) else []
