"""The `opticnerve` command: its commands, its exit codes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from opticnerve.cli import (
    ask,
    chat,
    compare,
    data,
    demo,
    evaluate,
    export,
    import_,
    look,
    merge,
    parts,
    plan,
    push,
    serve,
    train,
    ui,
    vectors,
)
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
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    if debug:
        show_tracebacks(True)


app.command("demo", epilog=demo.EPILOG)(guarded(demo.demo))
app.command("plan", epilog=plan.EPILOG)(guarded(plan.plan))
app.command("train", epilog=train.EPILOG)(guarded(train.train))
app.command("ask", epilog=ask.EPILOG)(guarded(ask.ask))
app.command("chat", epilog=chat.EPILOG)(guarded(chat.chat))
app.command("eval", epilog=evaluate.EPILOG)(guarded(evaluate.evaluate))
app.command("merge", epilog=merge.EPILOG)(guarded(merge.merge))
app.command("export", epilog=export.EPILOG)(guarded(export.export))
app.command("push", epilog=push.EPILOG)(guarded(push.push))
app.command("import", epilog=import_.EPILOG)(guarded(import_.import_))
app.command("parts", epilog=parts.EPILOG)(guarded(parts.parts))
app.command("classify", epilog=vectors.CLASSIFY_EPILOG)(guarded(vectors.classify))
app.command("embed", epilog=vectors.EMBED_EPILOG)(guarded(vectors.embed))
app.command("look", epilog=look.EPILOG)(guarded(look.look))
app.command("serve", epilog=serve.EPILOG)(guarded(serve.serve))
app.command("ui", epilog=ui.EPILOG)(guarded(ui.ui))
app.add_typer(compare.app, name="compare")
app.add_typer(data.app, name="data")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    before_dashes = words[: words.index("--")] if "--" in words else words
    if "--debug" in before_dashes:
        words.remove("--debug")
        show_tracebacks(True)
    app(args=words, prog_name="opticnerve")
