"""`opticnerve export`, `merge`, `push` and `import`: models for other engines and from them, proved by both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from opticnerve.cli.guard import emit
from opticnerve.cli.options import JsonFlag, ModelArgument, TrustFlag
from opticnerve.cli.output import console_for, examples, print_json, quiet_libraries
from opticnerve.common.units import format_bytes

if TYPE_CHECKING:
    from opticnerve.export.export import Exported

EXPORT_EPILOG = examples(
    "opticnerve export runs/photos exported --to hf-llava",
    "opticnerve export runs/photos exported-gguf --to gguf --dtype q8_0 --check-python llama/bin/python",
    note="hf-llava: stock transformers and vLLM. hf-llava-next (tiling), hf-idefics3 (pixel_shuffle), hf-blip2 "
    "(qformer): stock transformers. gguf: llama.cpp. merged: opticnerve's own, self-contained. peft: the adapters.",
)
MERGE_EPILOG = examples(
    "opticnerve merge runs/demo runs/demo-merged",
    'opticnerve ask runs/demo-merged "what shape is in the image?" --image picture.png',
    note="The folder loads with `AutoModelForImageTextToText.from_pretrained` once `opticnerve` is imported.",
)
PUSH_EPILOG = examples(
    "opticnerve push runs/photos me/photos --to hf-llava --license apache-2.0",
    "opticnerve push runs/photos me/photos --to-folder cards",
    note="The hub's token comes from the environment (HF_TOKEN) or from `hf auth login`.",
)
IMPORT_EPILOG = examples(
    "opticnerve import llava-hf/llava-1.5-7b-hf models/llava-1.5-7b",
    'opticnerve ask models/llava-1.5-7b "what is in the picture?" --image picture.png',
    note="Known: LLaVA-1.5, LLaVA-NeXT, BLIP-2 and InstructBLIP in transformers' format, on causal language models.",
)
NewFolder = Annotated[Path, Argument(help="The new folder; it must not exist yet.")]
CheckPython = Annotated[
    str | None,
    Option(help="gguf: an interpreter that has `xllamacpp`, which loads the files and answers for llama.cpp."),
]
Unchecked = Annotated[
    bool, Option("--unchecked", help="Go without proof; the folder's README says so. Not recommended.")
]


def export(
    model: ModelArgument,
    out: NewFolder,
    to: Annotated[
        str, Option(help="The format: hf-llava, hf-llava-next, hf-idefics3, hf-blip2, gguf, merged or peft.")
    ],
    dtype: Annotated[
        str,
        Option(help="Of the weights: auto, float32, bfloat16, float16; gguf: f16 (auto), bf16, q8_0, float32."),
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
    options = Options(dtype, check_python, unchecked, trust_remote_code)
    _show_exported(exported(model, to, out, options=options, emit=_progress(as_json)), model, as_json)


def merge(
    model: ModelArgument, out: NewFolder, trust_remote_code: TrustFlag = False, as_json: JsonFlag = False
) -> None:
    """Write a self-contained folder: all weights (LoRA added into them), configuration and processor in one place.

    A run keeps only what it trained and names the rest; a merged folder can be moved, shared and loaded anywhere. It is
    loaded once in a process of its own and must give the same answers: `opticnerve export --to merged`, in short.
    """
    from opticnerve.export.export import export as exported
    from opticnerve.export.formats import Options

    quiet_libraries()
    options = Options(trust_remote_code=trust_remote_code)
    _show_exported(exported(model, "merged", out, options=options), model, as_json)


def push(
    model: ModelArgument,
    repo: Annotated[str, Argument(help="The repository: OWNER/NAME.")],
    to: Annotated[
        str, Option(help="The format: merged, hf-llava, hf-llava-next, hf-idefics3, hf-blip2, gguf or peft.")
    ] = "merged",
    to_folder: Annotated[
        Path | None, Option(help="Put all that would be uploaded into a folder NAME here; no hub is asked.")
    ] = None,
    licence: Annotated[str | None, Option("--license", help="For the card, as the hub calls it.")] = None,
    dataset: Annotated[list[str] | None, Option(help="For the card; may be given several times.")] = None,
    private: Annotated[bool, Option("--private", help="A new repository is seen by its owner alone.")] = False,
    dtype: Annotated[str, Option(help="Of the weights, as for `export`.")] = "auto",
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
    done = pushed(
        model, repo, to=to, to_folder=to_folder, licence=licence, datasets=dataset or (), private=private,
        options=Options(dtype, check_python, unchecked, trust_remote_code), emit=_progress(as_json),
    )  # fmt: skip
    if as_json:
        print_json({"source": model, "place": done.place, **asdict(done.exported)})
    elif to_folder is not None:
        _show_exported(done.exported, model, as_json=False)
    else:
        console_for(False).print(f"uploaded: [bold]{done.place}[/]", soft_wrap=True, highlight=False)


def import_(
    name: Annotated[str, Argument(help="Hub name or folder of the checkpoint.", metavar="NAME_OR_FOLDER")],
    out: NewFolder,
    dtype: Annotated[
        str, Option(help="Of the weights on disk: auto (as the checkpoint has them), float32, bfloat16, float16.")
    ] = "auto",
    device: Annotated[str, Option(help="Where both models run, in float32, to be compared.")] = "cpu",
    as_json: JsonFlag = False,
) -> None:
    """Turn a LLaVA, LLaVA-NeXT or -OneVision, InternVL, Idefics3, SmolVLM or BLIP-2 into a folder of opticnerve.

    Every tensor is accounted for, and both models must give the same logits on fixed samples; otherwise the message
    says what cannot be imported, and nothing is written.
    """
    from opticnerve.models.import_hf.run import import_checkpoint

    quiet_libraries()
    made = import_checkpoint(name, out, dtype=dtype, device=device, emit=_progress(as_json))
    tower = made.towers["image"]
    if as_json:
        known = ("model_type", "language", "dtype", "tensors", "samples", "notes")
        result = {"source": name, "out": str(made.folder), "image": tower, **{k: getattr(made, k) for k in known}}
        print_json({**result, "max_abs_difference": made.difference, "bytes": _size(made.folder)})
        return
    vision_encoder = tower["encoder"].get("architecture", {}).get("model_type", tower["encoder"]["type"])
    parts = [vision_encoder, tower["connector"]["type"], tower["fusion"]["type"]]
    parts += ["tiling"] if "tiling" in tower else []
    _show_written(
        made,
        f"{made.model_type}: {' × '.join(parts)} → {made.language}",
        f"{made.tensors} tensors, all accounted for; logits on {made.samples} prompts differ by at most "
        f"{made.difference:.2g} (float32)",
    )


def _progress(as_json: bool) -> Callable[[str], None]:
    console = console_for(as_json)
    return lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True)


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def _show_exported(made: Exported, source: str, as_json: bool) -> None:
    """What came of an export."""
    if as_json:
        print_json({"source": source, "out": str(made.folder), "bytes": _size(made.folder), **asdict(made)})
        return
    proof, lines = made.proof, []
    if proof is not None:
        lines = [
            f"{proof.engine} gives the same answers to {proof.samples} prompts: off by {proof.difference:.2g} "
            f"{proof.unit} at most, {proof.allowed:g} is allowed"
        ]
    _show_written(made, *lines)


def _show_written(made: Any, *lines: str) -> None:
    """`lines`, the notes of what was made, and where it lies."""
    console = console_for(False)
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    for note in made.notes:
        if note.startswith("UNCHECKED"):
            emit(note, style="bold yellow")
        else:
            console.print(f"note: {note}", highlight=False, soft_wrap=True, markup=False)
    size = format_bytes(_size(made.folder))
    console.print(f"wrote [bold]{made.folder}[/] ({size}, {made.dtype})", soft_wrap=True, highlight=False)
