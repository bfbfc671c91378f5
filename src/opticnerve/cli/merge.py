"""`opticnerve merge`: a folder that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from opticnerve.cli.ask import MODEL_HELP
from opticnerve.cli.output import JsonFlag, TrustFlag, console_for, examples, print_json, quiet_libraries, size

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

    A run keeps only what it trained and names the rest; a merged folder can be moved, shared and loaded anywhere.
    """
    from opticnerve.cli.places import model_folder
    from opticnerve.models.merge import merge as merged

    quiet_libraries()
    written = merged(Path(model_folder(model)), out, trust_remote_code=trust_remote_code)
    total = sum(f.stat().st_size for f in written.rglob("*") if f.is_file())
    if as_json:
        print_json({"source": model, "out": str(written), "bytes": total})
    else:
        console_for(False).print(f"wrote [bold]{written}[/] ({size(total)})", soft_wrap=True, highlight=False)
