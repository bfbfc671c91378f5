"""`opticnerve import`: models that others trained, as folders of opticnerve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from opticnerve.cli.output import JsonFlag, console_for, examples, print_json, quiet_libraries, size

EPILOG = examples(
    "opticnerve import llava-hf/llava-1.5-7b-hf models/llava-1.5-7b",
    'opticnerve ask models/llava-1.5-7b "what is in the picture?" --image picture.png',
    note="Known: LLaVA-1.5, LLaVA-NeXT, BLIP-2 and InstructBLIP in transformers' format, on causal language models.",
)


def import_(
    name: Annotated[str, typer.Argument(help="Hub name or folder of the checkpoint.", metavar="NAME_OR_FOLDER")],
    out: Annotated[Path, typer.Argument(help="The new folder; it must not exist yet.")],
    dtype: Annotated[
        str, typer.Option(help="Of the weights on disk: auto (as the checkpoint has them), float32, bfloat16, float16.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="Where both models run, in float32, to be compared.")] = "cpu",
    as_json: JsonFlag = False,
) -> None:
    """Turn a LLaVA-1.5, LLaVA-NeXT, BLIP-2 or InstructBLIP checkpoint into a folder of opticnerve.

    Every tensor is accounted for, and both models must give the same logits on fixed samples; otherwise the message
    says what cannot be imported, and nothing is written.
    """
    from opticnerve.models.import_hf.run import import_checkpoint

    quiet_libraries()
    console = console_for(as_json)
    made = import_checkpoint(
        name, out, dtype=dtype, device=device, emit=lambda line: console.print(line, highlight=False, soft_wrap=True)
    )
    total = sum(f.stat().st_size for f in made.folder.rglob("*") if f.is_file())
    tower = made.towers["image"]
    if as_json:
        known = ("model_type", "language", "dtype", "tensors", "samples", "notes")
        result = {"source": name, "out": str(made.folder), "image": tower, **{k: getattr(made, k) for k in known}}
        print_json({**result, "max_abs_difference": made.difference, "bytes": total})
        return
    vision_encoder = tower["encoder"].get("architecture", {}).get("model_type", tower["encoder"]["type"])
    parts = [
        vision_encoder,
        tower["connector"]["type"],
        tower["fusion"]["type"],
        *(["tiling"] if "tiling" in tower else []),
    ]
    console.print(f"{made.model_type}: {' × '.join(parts)} → {made.language}", highlight=False, soft_wrap=True)
    console.print(
        f"{made.tensors} tensors, all accounted for; logits on {made.samples} prompts differ by at most "
        f"{made.difference:.2g} (float32)",
        highlight=False,
        soft_wrap=True,
    )
    for note in made.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"wrote [bold]{made.folder}[/] ({size(total)}, {made.dtype})", highlight=False, soft_wrap=True)
