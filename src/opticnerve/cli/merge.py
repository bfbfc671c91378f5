"""`opticnerve merge`: a folder that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from opticnerve.cli.ask import MODEL_HELP
from opticnerve.cli.output import JsonFlag, TrustFlag, examples, quiet_libraries

EPILOG = examples(
    "opticnerve merge runs/demo runs/demo-merged",
    'opticnerve ask runs/demo-merged "what shape is in the image?" --image picture.png',
    note="The folder loads with `AutoModelForImageTextToText.from_pretrained` once `opticnerve` is imported.",
)


def merge(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    out: Annotated[Path, typer.Argument(help="The new folder; it must not exist yet.")],
    trust_remote_code: TrustFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Write a self-contained folder: all weights (LoRA added into them), configuration and processor in one place.

    A run keeps only what it trained and names the rest; a merged folder can be moved, shared and loaded anywhere. It is
    loaded once in a process of its own and must give the same answers: `opticnerve export --to merged`, in short.
    """
    from opticnerve.cli.export import tell
    from opticnerve.export.export import export
    from opticnerve.export.formats import Options

    quiet_libraries()
    made = export(model, "merged", out, options=Options(trust_remote_code=trust_remote_code))
    tell(made, model, as_json)
