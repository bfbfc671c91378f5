"""The `opticnerve` command: its commands, its exit codes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from typer import Option

from opticnerve.cli import ask, compare, data, evaluate, export, look, parts, plan, serve, train, vectors
from opticnerve.cli.guard import MEANING, guarded, show_tracebacks
from opticnerve.common.version import __version__

_CODES = "\n\n".join(f"[cyan]{code}[/]  {meaning}" for code, meaning in MEANING.items())
EPILOG = f"""[bold]A first run[/]

[green]opticnerve demo[/]

[green]opticnerve ask runs/demo "what shape is in the image?" --image picture.png[/]

[bold]Exit codes[/]

{_CODES}"""

app = typer.Typer(
    name="opticnerve",
    help="Dock any pretrained vision encoder or audio encoder onto any pretrained language model, and make one "
    "model of them.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    # Their options alone would cost `COMMAND --help` a third of its time.
    add_completion=False,
    # A `--help` not given counts as False, not as unknown: typer would import pydantic to turn None into a bool.
    context_settings={
        "help_option_names": ["-h", "--help"],
        "default_map": {"help": False, "data": {"help": False}},
    },
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"opticnerve {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    if debug:
        show_tracebacks(True)


for _name, _function, _epilog in (
    ("demo", train.demo, train.DEMO_EPILOG),
    ("plan", plan.plan, plan.EPILOG),
    ("train", train.train, train.TRAIN_EPILOG),
    ("sweep", compare.sweep, compare.SWEEP_EPILOG),
    ("ask", ask.ask, ask.ASK_EPILOG),
    ("chat", ask.chat, ask.CHAT_EPILOG),
    ("eval", evaluate.evaluate, evaluate.EPILOG),
    ("merge", export.merge, export.MERGE_EPILOG),
    ("export", export.export, export.EXPORT_EPILOG),
    ("push", export.push, export.PUSH_EPILOG),
    ("import", export.import_, export.IMPORT_EPILOG),
    ("parts", parts.parts, parts.EPILOG),
    ("classify", vectors.classify, vectors.CLASSIFY_EPILOG),
    ("embed", vectors.embed, vectors.EMBED_EPILOG),
    ("look", look.look_command, look.EPILOG),
    ("serve", serve.serve, serve.SERVE_EPILOG),
    ("ui", serve.ui, serve.UI_EPILOG),
):
    app.command(_name, epilog=_epilog)(guarded(_function))
app.add_typer(compare.app, name="compare")
app.add_typer(data.app, name="data")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code."""
    # peft imports bitsandbytes where it is installed, which then misses kernels that it would fetch from a hub.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    words = list(sys.argv[1:] if arguments is None else arguments)
    before_dashes = words[: words.index("--")] if "--" in words else words
    if "--debug" in before_dashes:
        words.remove("--debug")
        show_tracebacks(True)
    app(args=words, prog_name="opticnerve")
