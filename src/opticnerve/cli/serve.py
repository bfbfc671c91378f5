"""`opticnerve serve`: an OpenAI-compatible API for one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from opticnerve.cli.ask import MODEL_HELP
from opticnerve.cli.output import TrustFlag, examples, quiet_libraries

EPILOG = examples(
    "opticnerve serve starter",
    "opticnerve serve runs/demo --port 8080 --slots 16",
    "OPTICNERVE_API_KEY=… opticnerve serve runs/demo --host 0.0.0.0",
    note="docs/serving.md says what clients may ask for, and how the server protects itself.",
)


def serve(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    host: Annotated[str, typer.Option(help="The address to listen on; this machine alone by default.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name for clients.", show_default="MODEL")] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="A key that clients must send; may be given several times. OPTICNERVE_API_KEY holds one too."
        ),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A file with a key on each line.")] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Let others in without a key.")] = False,
    slots: Annotated[int, typer.Option(min=1, help="Answers written at a time.")] = 8,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait beside them; more get 429.")] = 64,
    max_context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of prompt and answer.", show_default="the model's")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer where a request does not say.")] = 512,
    max_body: Annotated[
        int, typer.Option(min=1, help="Bytes of a request, and of a picture from elsewhere.")
    ] = 20_000_000,
    max_media: Annotated[int, typer.Option(min=0, help="Pictures and sounds of a request.")] = 8,
    max_pixels: Annotated[int, typer.Option(min=1, help="Of all pictures of a request together.")] = 64_000_000,
    max_audio_seconds: Annotated[float, typer.Option(min=0.1, help="Of each sound.")] = 600.0,
    request_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one request.")] = 300.0,
    grace: Annotated[float, typer.Option(min=0.0, help="Seconds for running answers once told to stop.")] = 30.0,
    allow_url_host: Annotated[
        list[str] | None, typer.Option(help="HOST or HOST:PORT that pictures may be fetched from; several times.")
    ] = None,
    allow_media: Annotated[
        list[Path] | None, typer.Option(help="A folder whose files may be named as file:///…; several times.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …", show_default="the first accelerator")] = None,
    trust_remote_code: TrustFlag = False,
) -> None:
    """Serve a model to OpenAI's clients. SIGTERM or Ctrl-C lets running answers end."""
    import logging
    import os

    from opticnerve.types import OpticNerveError, to_install

    try:
        from opticnerve.serve.auth import Keys, check_address
        from opticnerve.serve.limits import Limits
        from opticnerve.serve.media import Sources
        from opticnerve.serve.server import Server, Service, listen
    except ModuleNotFoundError as e:
        raise OpticNerveError(f"{e.name} is not installed: {to_install('opticnerve[serve]')}") from e
    from opticnerve.inference.load import load_model
    from opticnerve.web.listen import read_secrets

    keys = [*(api_key or ()), *(read_secrets(api_key_file) if api_key_file else ())]
    keys += [key] if (key := os.environ.get("OPTICNERVE_API_KEY")) else []
    # All that can be wrong is found before the model is loaded.
    local = check_address(host, Keys(keys), no_auth=no_auth)
    limits = Limits(
        slots=slots, queue=queue, body_bytes=max_body, media=max_media, pixels=max_pixels,
        audio_seconds=max_audio_seconds, context=max_context, answer_tokens=max_new_tokens,
        request_seconds=request_timeout, grace_seconds=grace,
    )  # fmt: skip
    sources = Sources(tuple(allow_url_host or ()), tuple(allow_media or ()))
    socket = listen(host, port)

    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("opticnerve.serve").setLevel(logging.INFO)
    quiet_libraries()
    loaded, processor = load_model(model, device=device, trust_remote_code=trust_remote_code)
    service = Service(
        model=loaded, processor=processor, name=name or (Path(model).name if Path(model).is_absolute() else model),
        limits=limits, keys=keys, sources=sources, only_host=host if local and not keys and not no_auth else None,
    )  # fmt: skip
    place = f"[{host}]" if ":" in host else host
    logging.getLogger("opticnerve.serve").info("%s at http://%s:%d/v1", service.name, place, socket.getsockname()[1])
    Server(service).run(sockets=[socket])
