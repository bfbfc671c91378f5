"""`opticnerve push`: a model with its card on a hub, or in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from opticnerve.cli.ask import MODEL_HELP
from opticnerve.cli.export import CheckPython, Unchecked, tell
from opticnerve.cli.output import JsonFlag, TrustFlag, console_for, examples, print_json, quiet_libraries

EPILOG = examples(
    "opticnerve push runs/photos me/photos --to hf-llava --license apache-2.0",
    "opticnerve push runs/photos me/photos --to-folder cards",
    note="The hub's token comes from the environment (HF_TOKEN) or from `hf auth login`.",
)


def push(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    repo: Annotated[str, typer.Argument(help="The repository: OWNER/NAME.")],
    to: Annotated[str, typer.Option(help="The format: merged, hf-llava, hf-idefics3, hf-blip2 or gguf.")] = "merged",
    to_folder: Annotated[
        Path | None, typer.Option(help="Put all that would be uploaded into a folder NAME here; no hub is asked.")
    ] = None,
    licence: Annotated[str | None, typer.Option("--license", help="For the card, as the hub calls it.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="For the card; may be given several times.")] = None,
    private: Annotated[bool, typer.Option("--private", help="A new repository is seen by its owner alone.")] = False,
    dtype: Annotated[str, typer.Option(help="Of the weights, as for `export`.")] = "auto",
    check_python: CheckPython = None,
    unchecked: Unchecked = False,
    trust_remote_code: TrustFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Export a model, put its run card beside it as the README, and upload both.

    The card says what trained on what, with which figures, and how the exported files were checked.
    """
    from opticnerve.export.formats import Options
    from opticnerve.export.publish import push as pushed

    quiet_libraries()
    console = console_for(as_json)
    done = pushed(
        model, repo, to=to, to_folder=to_folder, licence=licence, datasets=dataset or (), private=private,
        options=Options(dtype, check_python, unchecked, trust_remote_code),
        emit=lambda line: console.print(line, highlight=False, markup=False),
    )  # fmt: skip
    if as_json:
        from dataclasses import asdict

        print_json({"source": model, "place": done.place, **asdict(done.exported)})
        return
    if to_folder is not None:
        tell(done.exported, model, as_json=False)
    else:
        console.print(f"uploaded: [bold]{done.place}[/]", soft_wrap=True, highlight=False)
