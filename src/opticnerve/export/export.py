"""A model in, a folder in another format out: all of it or nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from opticnerve.common import atomic
from opticnerve.common.cache import new_folder
from opticnerve.export import parity, samples
from opticnerve.export.formats import PLAIN, Format, Options, Proof, Trial, formats
from opticnerve.inference.load import load_model
from opticnerve.language.load import no_bars
from opticnerve.models.vlm.build import quantization
from opticnerve.types import OpticNerveError

if TYPE_CHECKING:
    from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
    from opticnerve.models.vlm.processing import OpticNerveProcessor

RECORD = "export.json"


@dataclass
class Exported:
    """What came of an export. `proof` is None where the user wanted none; `rounding` is how far merging, dequantising
    and folding moved the logits, as a part of the largest one; `quantization` how far the parts that were trained over
    quantised weights, which are written dequantised, are from their bases (see `quantization.distance`)."""

    folder: Path
    format: str
    dtype: str
    rounding: float
    proof: Proof | None
    notes: list[str] = field(default_factory=list)
    quantization: dict[str, Any] = field(default_factory=dict)


def export(
    name: str | Path,
    to: str,
    out: str | Path,
    *,
    options: Options = PLAIN,
    emit: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Write a model in another engine's format, and let that engine prove it, before the folder gets its name.

    Our model runs in float32 on the CPU: memory for it is needed, and as much again for the engine.

    Args:
        name: as for `load_model`. to: the format's exact name. out: the new folder; it must not exist yet.
        emit: told what happens, a line at a time.

    Raises:
        OpticNerveError: the format cannot express the model (the message says what, and what it could), the engine is
            not there, or its answers differ. Nothing is left behind then.
    """
    out = Path(out)
    if out.exists():
        raise OpticNerveError(f"{out} exists already; choose another folder", kind="exists-already")
    maker: Format = formats.get(to)(options)
    if options.dtype not in ("auto", *maker.dtypes):
        raise OpticNerveError(
            f"{to} is not written as {options.dtype!r}; known: auto, {', '.join(maker.dtypes)}", kind="unknown-name"
        )
    if maker.needs and not options.check_python and not options.unchecked:
        raise OpticNerveError(
            f"{to} is proved by an engine that opticnerve does not bring along ({maker.needs}): name an interpreter "
            "that has it with --check-python, or say --unchecked to go without proof",
            kind="not-installed",
        )
    emit(f"reading {name}")
    dtype, trusted = getattr(torch, options.dtype, None), options.trust_remote_code
    model, processor = load_model(name, device="cpu", dtype=dtype, trust_remote_code=trusted)
    if reasons := maker.refuse(model, processor):
        raise OpticNerveError(f"{name} cannot be exported to {to}: {'; '.join(reasons)}", kind="unsupported")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent, ignore_cleanup_errors=True) as scratch:
        return _export(model, processor, maker, to, out, Path(scratch), emit)


def _export(
    model: OpticNerveForConditionalGeneration,
    processor: OpticNerveProcessor,
    maker: Format,
    to: str,
    out: Path,
    scratch: Path,
    emit: Callable[[str], None],
) -> Exported:
    towers = model.towers
    made_up = samples.make(
        scratch, picture_sizes=maker.picture_sizes(model), sees="image" in towers, hears="audio" in towers
    )
    chosen = maker.choose(made_up)
    emit("asking the model")
    before = parity.record(model, processor, chosen)
    quantized = quantization(model)
    maker.simplify(model, processor)
    wanted = parity.record(model, processor, chosen)
    dtype = model.language_model.dtype
    made = Exported(out, to, str(dtype).removeprefix("torch."), parity.check_rounding(before, wanted, dtype), None)
    with new_folder(out) as new, no_bars():
        emit(f"writing {out}")
        made.notes, made.quantization = maker.write(model, processor, new), quantized
        made.notes += [
            f"{part} was trained over {found['quantize']}; it is dequantised here, {found['distance']:.2%} off its base"
            for part, found in quantized.items()
        ]
        if maker.options.unchecked:
            note = f"no engine has loaded these {to} files, and nobody knows whether they answer as the model does"
            made.notes.append(f"UNCHECKED: {note}")
            again = "Export again without `--unchecked` for proof."
            atomic.write(new / "README.md", f"# UNCHECKED: {note}\n\n{again}\n")
        else:
            emit("comparing, in a process of its own")
            made.proof = maker.check(new, Trial(model, processor, chosen, wanted, scratch))
            made.notes += made.proof.notes
        record = {k: v for k, v in asdict(made).items() if k != "folder"}
        atomic.write_json(new / RECORD, record)
    return made
