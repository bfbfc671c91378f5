"""A checkpoint of transformers in, a folder of opticnerve out: all of it or nothing. The proof: every tensor has its
place, and both models give the same logits."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from opticnerve.common import hub
from opticnerve.common.cache import new_folder
from opticnerve.connectors.base import Connector
from opticnerve.language.load import no_bars
from opticnerve.models.import_hf import blip2, llava, nanovlm, original, shuffled
from opticnerve.models.import_hf.source import Source, check_image_token, common_refusals, read, read_config
from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
from opticnerve.models.vlm.placeholders import embedding_of, sayable
from opticnerve.models.vlm.processing import OpticNerveProcessor
from opticnerve.types import OpticNerveError

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Importable:
    """How one kind of checkpoint is imported.

    `module`: `llava`, `shuffled`, `blip2` or `nanovlm`, with `refuse`, `ready`, `convert` and `prompts`. `pictures`:
    the most that a prompt shows. `text_alone`: whether their model answers prompts without one.
    """

    model_class: str
    module: Any
    pictures: int
    text_alone: bool


FAMILIES = {
    "llava": Importable("LlavaForConditionalGeneration", llava, 2, True),
    "llava_next": Importable("LlavaNextForConditionalGeneration", llava, 2, True),
    "llava_onevision": Importable("LlavaOnevisionForConditionalGeneration", llava, 2, True),
    "internvl": Importable("InternVLForConditionalGeneration", shuffled, 2, True),
    "idefics3": Importable("Idefics3ForConditionalGeneration", shuffled, 2, True),
    "smolvlm": Importable("SmolVLMForConditionalGeneration", shuffled, 2, True),
    "blip-2": Importable("Blip2ForConditionalGeneration", blip2, 1, False),
    "instructblip": Importable("InstructBlipForConditionalGeneration", blip2, 1, False),
    "nanovlm": Importable("VisionLanguageModel", nanovlm, 2, True),
}
FORMATS: tuple[Any, ...] = (original, nanovlm)
"""Those that transformers does not read."""


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
    """Turn a checkpoint (`FAMILIES`: in transformers' format; `original`: in LLaVA's own or TinyLLaVA's;
    nanoVLM's) into a self-contained folder of opticnerve, and prove that the folder gives the same logits.

    Both models run in float32, one after the other: memory for one of them in float32 is needed.

    Args:
        name: hub name or folder. out: the new folder; it must not exist yet.
        dtype: of the weights on disk: "auto" as the checkpoint has them, or float32, bfloat16, float16.
        device: where the two models are compared.
        emit: called with what happens, a line at a time.

    Raises:
        OpticNerveError: something cannot be imported (the message says what), or the logits differ. Nothing is left
            behind then.
    """
    out = Path(out)
    if out.exists():
        raise OpticNerveError(f"{out} exists already; choose another folder", kind="exists-already")
    if dtype not in DTYPES:
        raise OpticNerveError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}", kind="unknown-name")
    raw = _written_config(str(name))
    own = next((f for f in FORMATS if f.recognises(raw)), None)
    config = read_config(str(name), list(FAMILIES)) if own is None else own.read_config(str(name), raw)
    family = FAMILIES[config.model_type]
    if reasons := common_refusals(config, family.model_class) + family.module.refuse(config):
        raise OpticNerveError(f"{name} cannot be imported: {'; '.join(reasons)}", kind="unsupported")
    emit(f"reading {name}")
    # Theirs goes before ours is read back: two models of this kind seldom fit side by side.
    source = read(str(name), family.model_class) if own is None else own.read(str(name), raw, config)
    model, processor, asked, made = _convert(source, out, family, config.dtype, dtype, device)
    del source
    with new_folder(out) as new, no_bars():
        emit(f"writing {out}")
        model.save_pretrained(new)
        processor.save_pretrained(new)
        del model
        gc.collect()
        emit("comparing")
        again = OpticNerveForConditionalGeneration.from_pretrained(new, dtype=torch.float32).to(device)
        made.difference = compare(again, OpticNerveProcessor.from_pretrained(new), asked)
    return made


def _written_config(name: str) -> dict[str, Any]:
    """config.json as it was written; empty where it is no such file, which whoever reads it as transformers' says."""
    try:
        raw = json.loads((Path(hub.fetch(name, weights=False)) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return raw if isinstance(raw, dict) else {}


def _convert(
    source: Source, out: Path, family: Importable, written: torch.dtype | None, asked: str, device: str
) -> tuple[Any, OpticNerveProcessor, list[ProofPrompt], Imported]:
    """Their model, run on the samples and taken apart; our model and processor made of its parts."""
    stored = _stored_dtype(source, written or torch.float32, asked)
    family.module.ready(source)
    image_token_id = check_image_token(source)
    source.model.to(device)
    language, tower, processor = family.module.convert(source)
    chosen = samples(partial(family.module.prompts, source, processor), family.pictures, family.text_alone)
    with placeholders_known(source.model, image_token_id):
        record(source.model, source.processor, chosen)
    model = OpticNerveForConditionalGeneration.from_parts(language, {"image": tower}, image_token_id=image_token_id)
    made = Imported(
        folder=out,
        model_type=source.config.model_type,
        towers=model.config.towers,
        language=source.config.text_config.model_type,
        dtype=str(stored).removeprefix("torch."),
        tensors=account(source.model, model),
        samples=len(chosen),
        difference=float("nan"),
        notes=source.notes,
    )
    model.to("cpu", stored)
    model.config.dtype = model.config.text_config.dtype = stored
    return model, processor, chosen, made


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


# -- the proof -----------------------------------------------------------------------------------------------------

TOLERANCE = 1e-4
# Heights and widths, and which of them each question is about.
PICTURES = ((240, 320), (333, 97))
QUESTIONS: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("what is in the picture?", (0,)),
    ("is it red?", (1,)),
    ("compare the two pictures", (0, 1)),
    ("name a colour", ()),
)


@dataclass
class ProofPrompt:
    """One prompt in their form and in ours, with its pictures; their ids and logits once they are known."""

    their_text: str
    our_text: str
    pictures: list[PIL.Image.Image]
    ids: Tensor | None = None
    logits: Tensor | None = None


def samples(write: Callable[[str, int], tuple[str, str]], most_pictures: int, text_alone: bool) -> list[ProofPrompt]:
    """The fixed prompts, as far as the family takes them, about pictures of fixed noise."""
    rng = np.random.default_rng(0)
    pictures = [PIL.Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in PICTURES]
    return [
        ProofPrompt(*write(question, len(shown)), [pictures[i] for i in shown])
        for question, shown in QUESTIONS
        if len(shown) <= most_pictures and (shown or text_alone)
    ]


def account(theirs: nn.Module, ours: nn.Module) -> int:
    """Every tensor of theirs stands in ours, and every one of ours comes from theirs; returns how many there are.

    The tensors themselves were moved, so that identity decides. A connector's calibration is ours alone, and changes
    nothing. An error lists those without a place and those without a source.
    """
    mine, yours = ours.state_dict(keep_vars=True), theirs.state_dict(keep_vars=True)
    calibration = {
        f"{path}.{name}"
        for path, module in ours.named_modules()
        if isinstance(module, Connector)
        for name, _ in module.named_buffers(recurse=False)
    }
    kept, known = {id(t) for t in mine.values()}, {id(t) for t in yours.values()}
    lost = sorted(n for n, t in yours.items() if id(t) not in kept)
    new = sorted(n for n, t in mine.items() if id(t) not in known and n not in calibration)
    if lost or new:
        listing = [f"no place for {n}" for n in lost] + [f"no source for {n}" for n in new]
        raise OpticNerveError(
            f"the checkpoint and opticnerve's parts differ: {'; '.join(listing[:12])}", kind="mismatch"
        )
    return len(known)


@contextmanager
def placeholders_known(model: PreTrainedModel, image_token_id: int) -> Iterator[None]:
    """Within it, their model looks up a placeholder beyond its embedding table, too."""
    table = model.get_input_embeddings()
    model.set_input_embeddings(embedding_of(table, [image_token_id]))
    try:
        yield
    finally:
        model.set_input_embeddings(table)


@torch.no_grad()
def record(model: PreTrainedModel, processor: ProcessorMixin, chosen: Sequence[ProofPrompt]) -> None:
    """Run their model, in float32, on every sample."""
    for sample in chosen:
        try:
            inputs = processor(images=sample.pictures or None, text=sample.their_text, return_tensors="pt")
            sample.ids = inputs["input_ids"][0]
            sample.logits = model(**inputs.to(model.device)).logits[0].float().cpu()
        except (ValueError, RuntimeError, TypeError, IndexError) as e:
            raise OpticNerveError(
                f"the checkpoint itself does not run in transformers: {e} (prompt {sample.their_text!r})",
                kind="damaged",
            ) from e


@torch.no_grad()
def compare(
    model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor, chosen: Sequence[ProofPrompt]
) -> float:
    """The largest difference of any logit between their model (recorded) and ours, in float32; an error if it is
    `TOLERANCE` or more, or our processor writes other tokens."""
    worst = 0.0
    for sample in chosen:
        assert sample.ids is not None
        assert sample.logits is not None
        inputs = processor(images=sample.pictures or None, text=sample.our_text, return_tensors="pt")
        ids = inputs["input_ids"][0]
        if ids.tolist() != sample.ids.tolist():
            raise OpticNerveError(
                f"the imported processor writes {len(ids)} tokens where the checkpoint's writes {len(sample.ids)}, "
                f"or others: {ids[-8:].tolist()} at the end, not {sample.ids[-8:].tolist()}",
                kind="mismatch",
            )
        logits = model(**inputs.to(model.device)).logits[0].float().cpu()
        if logits.shape[:-1] != sample.logits.shape[:-1]:
            raise OpticNerveError(
                f"the imported model gives logits {tuple(logits.shape)}, theirs {tuple(sample.logits.shape)}",
                kind="mismatch",
            )
        words = sayable(logits)
        worst = max(worst, float((logits[:, words] - sample.logits[:, words]).abs().max()))
    # Written so that NaN fails, too.
    if not worst < TOLERANCE:
        raise OpticNerveError(
            f"the imported model's logits differ by up to {worst:.3g} (in float32, {TOLERANCE:g} is allowed): "
            "something in this checkpoint works otherwise than its configuration says",
            kind="mismatch",
        )
    return worst
