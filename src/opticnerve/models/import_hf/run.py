"""A checkpoint of transformers in, a folder of opticnerve out: all of it or nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from opticnerve.common.cache import new_folder
from opticnerve.language.load import no_bars
from opticnerve.models.import_hf import blip2, llava, verify
from opticnerve.models.import_hf.source import Source, check_image_token, common_refusals, read, read_config
from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
from opticnerve.models.vlm.processing import OpticNerveProcessor
from opticnerve.types import OpticNerveError

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Family:
    """How one kind of checkpoint is imported.

    `module`: `llava` or `blip2`, with `refuse`, `ready`, `convert` and `prompts`. `pictures`: the most that a prompt
    shows. `text_alone`: whether their model answers prompts without one.
    """

    model_class: str
    module: Any
    pictures: int
    text_alone: bool


FAMILIES = {
    "llava": Family("LlavaForConditionalGeneration", llava, 2, True),
    "llava_next": Family("LlavaNextForConditionalGeneration", llava, 2, True),
    "blip-2": Family("Blip2ForConditionalGeneration", blip2, 1, False),
    "instructblip": Family("InstructBlipForConditionalGeneration", blip2, 1, False),
}


@dataclass
class Imported:
    """What came of an import: where it is, what it is made of, how well it agrees, and what the user should know."""

    folder: Path
    model_type: str
    towers: dict[str, Any]
    language: str
    dtype: str
    tensors: int
    samples: int
    difference: float
    notes: list[str] = field(default_factory=list)


def import_checkpoint(
    name: str | Path,
    out: str | Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    emit: Callable[[str], None] = lambda line: None,
) -> Imported:
    """Turn a LLaVA-1.5, LLaVA-NeXT, BLIP-2 or InstructBLIP checkpoint in transformers' format into a self-contained
    folder of opticnerve, and prove that the folder gives the same logits.

    Both models run in float32, one after the other: memory for one of them in float32 is needed.

    Args:
        name: hub name or folder. out: the new folder; it must not exist yet.
        dtype: of the weights on disk: "auto" as the checkpoint has them, or float32, bfloat16, float16.
        device: where the two models are compared.
        say: told what happens, a line at a time.

    Raises:
        OpticNerveError: something cannot be imported (the message says what), or the logits differ. Nothing is left
            behind then.
    """
    out = Path(out)
    if out.exists():
        raise OpticNerveError(f"{out} exists already; choose another folder")
    if dtype not in DTYPES:
        raise OpticNerveError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    config = read_config(str(name), list(FAMILIES))
    family = FAMILIES[config.model_type]
    if reasons := common_refusals(config, family.model_class) + family.module.refuse(config):
        raise OpticNerveError(f"{name} cannot be imported: {'; '.join(reasons)}")
    emit(f"reading {name}")
    # Theirs goes before ours is read back: two models of this kind seldom fit side by side.
    model, processor, samples, made = _convert(str(name), out, family, config.dtype, dtype, device)
    with new_folder(out) as new, no_bars():
        emit(f"writing {out}")
        model.save_pretrained(new)
        processor.save_pretrained(new)
        del model
        gc.collect()
        emit("comparing")
        again = OpticNerveForConditionalGeneration.from_pretrained(new, dtype=torch.float32).to(device)
        made.difference = verify.compare(again, OpticNerveProcessor.from_pretrained(new), samples)
    return made


def _convert(
    name: str, out: Path, family: Family, written: torch.dtype | None, asked: str, device: str
) -> tuple[Any, OpticNerveProcessor, list[verify.Sample], Imported]:
    """Their model, run on the samples and taken apart; our model and processor made of its parts."""
    source = read(name, family.model_class)
    stored = _stored_dtype(source, written or torch.float32, asked)
    family.module.ready(source)
    image_token_id = check_image_token(source)
    source.model.to(device)
    language, tower, processor = family.module.convert(source)
    samples = verify.samples(
        lambda question, count: family.module.prompts(source, processor, question, count),
        family.pictures,
        family.text_alone,
    )
    verify.record(source.model, source.processor, samples)
    model = OpticNerveForConditionalGeneration.from_parts(language, {"image": tower}, image_token_id=image_token_id)
    made = Imported(
        folder=out,
        model_type=source.config.model_type,
        towers=model.config.towers,
        language=source.config.text_config.model_type,
        dtype=str(stored).removeprefix("torch."),
        tensors=verify.account(source.model, model),
        samples=len(samples),
        difference=float("nan"),
        notes=source.notes,
    )
    model.to("cpu", stored)
    model.config.dtype = model.config.text_config.dtype = stored
    return model, processor, samples, made


def _stored_dtype(source: Source, written: torch.dtype, asked: str) -> torch.dtype:
    """The dtype of the weights on disk. "auto": what config.json says, if that holds every digit of every tensor.

    Who asks for fewer digits compares with a model that has as few: theirs is rounded, too.
    """
    dtype: torch.dtype = written if asked == "auto" else getattr(torch, asked)
    tensors = [t for t in source.model.state_dict().values() if t.is_floating_point()]
    if asked != "auto":
        for tensor in tensors:
            tensor.copy_(tensor.to(dtype))
    elif not all(bool((t.to(dtype) == t).all()) for t in tensors):
        source.notes.append(f"some weights have more digits than config.json says ({dtype}); all are kept in float32")
        return torch.float32
    return dtype
