"""`opticnerve export`: a docked model for other engines, proved by them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from opticnerve.cli.ask import MODEL_HELP
from opticnerve.cli.output import JsonFlag, TrustFlag, console_for, examples, print_json, quiet_libraries, size

EPILOG = examples(
    "opticnerve export runs/photos exported --to hf-llava",
    "opticnerve export runs/photos exported-gguf --to gguf --dtype q8_0 --check-python llama/bin/python",
    note="hf-llava: stock transformers and vLLM. hf-idefics3 (pixel_shuffle), hf-blip2 (qformer): stock transformers. "
    "gguf: llama.cpp. merged: opticnerve's own, self-contained.",
)
CheckPython = Annotated[
    str | None,
    typer.Option(help="gguf: an interpreter that has `xllamacpp`, which loads the files and answers for llama.cpp."),
]
Unchecked = Annotated[
    bool, typer.Option("--unchecked", help="Go without proof; the folder's README says so. Not recommended.")
]


def export(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    out: Annotated[Path, typer.Argument(help="The new folder; it must not exist yet.")],
    to: Annotated[str, typer.Option(help="The format: hf-llava, hf-idefics3, hf-blip2, gguf or merged.")],
    dtype: Annotated[
        str,
        typer.Option(help="Of the weights: auto, float32, bfloat16, float16; gguf: f16 (auto), bf16, q8_0, float32."),
    ] = "auto",
    check_python: CheckPython = None,
    unchecked: Unchecked = False,
    trust_remote_code: TrustFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Write a model in another engine's format. The engine must give the same answers, or nothing is written.

    It loads the new folder in a process of its own, and both answer the same prompts. What a format cannot express is
    refused with the reason, and the nearest recipe that it can.
    """
    from opticnerve.export.export import export as exported
    from opticnerve.export.formats import Options

    quiet_libraries()
    console = console_for(as_json)
    options = Options(dtype, check_python, unchecked, trust_remote_code)
    made = exported(
        model, to, out, options=options, emit=lambda line: console.print(line, highlight=False, markup=False)
    )
    tell(made, model, as_json)


def tell(made: object, source: str, as_json: bool) -> None:
    """What came of an export."""
    from dataclasses import asdict

    from opticnerve.cli.guard import emit
    from opticnerve.export.export import Exported

    assert isinstance(made, Exported)
    total = sum(f.stat().st_size for f in made.folder.rglob("*") if f.is_file())
    if as_json:
        print_json({"source": source, "out": str(made.folder), "bytes": total, **asdict(made)})
        return
    console = console_for(False)
    if made.proof is not None:
        proof = made.proof
        console.print(
            f"{proof.engine} gives the same answers to {proof.samples} prompts: off by {proof.difference:.2g} "
            f"{proof.unit} at most, {proof.allowed:g} is allowed",
            highlight=False,
            soft_wrap=True,
        )
    for note in made.notes:
        if note.startswith("UNCHECKED"):
            emit(note, style="bold yellow")
        else:
            console.print(f"note: {note}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"wrote [bold]{made.folder}[/] ({size(total)}, {made.dtype})", soft_wrap=True, highlight=False)
