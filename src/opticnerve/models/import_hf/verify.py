"""Proof of an import: every tensor has its place, and both models give the same logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from opticnerve.connectors.base import Connector
from opticnerve.types import OpticNerveError

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
class Sample:
    """One prompt in their form and in ours, with its pictures; their ids and logits once they are known."""

    their_text: str
    our_text: str
    pictures: list[PIL.Image.Image]
    ids: Tensor | None = None
    logits: Tensor | None = None


def samples(write: Callable[[str, int], tuple[str, str]], most_pictures: int, text_alone: bool) -> list[Sample]:
    """The fixed prompts, as far as the family takes them, about pictures of fixed noise."""
    rng = np.random.default_rng(0)
    pictures = [PIL.Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in PICTURES]
    return [
        Sample(*write(question, len(shown)), [pictures[i] for i in shown])
        for question, shown in QUESTIONS
        if len(shown) <= most_pictures and (shown or text_alone)
    ]


def account(theirs: nn.Module, ours: nn.Module) -> int:
    """Every tensor of theirs stands in ours, and every one of ours comes from theirs; returns how many there are.

    The tensors themselves were moved, so that identity decides. A connector's calibration is ours alone, and changes
    nothing.

    Raises:
        OpticNerveError: the message lists those without a place and those without a source.
    """
    mine, yours = _tensors(ours), _tensors(theirs)
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
        raise OpticNerveError(f"the checkpoint and opticnerve's parts differ: {'; '.join(listing[:12])}")
    return len(known)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint carries: parameters (tied ones under each of their names) and persistent buffers."""
    saved = module.state_dict().keys()
    buffers = {n: b for n, b in module.named_buffers(remove_duplicate=False) if n in saved}
    return {**dict(module.named_parameters(remove_duplicate=False)), **buffers}


@torch.no_grad()
def record(model: Any, processor: Any, chosen: Sequence[Sample]) -> None:
    """Run their model, in float32, on every sample.

    Raises:
        OpticNerveError: it does not run.
    """
    for sample in chosen:
        try:
            inputs = processor(images=sample.pictures or None, text=sample.their_text, return_tensors="pt")
            sample.ids = inputs["input_ids"][0]
            sample.logits = model(**inputs.to(model.device)).logits[0].float().cpu()
        except (ValueError, RuntimeError, TypeError, IndexError) as e:
            raise OpticNerveError(
                f"the checkpoint itself does not run in transformers: {e} (prompt {sample.their_text!r})"
            ) from e


@torch.no_grad()
def compare(model: Any, processor: Any, chosen: Sequence[Sample]) -> float:
    """The largest difference of any logit between their model (recorded) and ours, in float32.

    Raises:
        OpticNerveError: our processor writes other tokens, or a logit differs by `TOLERANCE` or more.
    """
    worst = 0.0
    for sample in chosen:
        assert sample.ids is not None
        assert sample.logits is not None
        inputs = processor(images=sample.pictures or None, text=sample.our_text, return_tensors="pt")
        ids = inputs["input_ids"][0]
        if ids.tolist() != sample.ids.tolist():
            raise OpticNerveError(
                f"the imported processor writes {len(ids)} tokens where the checkpoint's writes {len(sample.ids)}, "
                f"or others: {ids[-8:].tolist()} at the end, not {sample.ids[-8:].tolist()}"
            )
        logits = model(**inputs.to(model.device)).logits[0].float().cpu()
        if logits.shape != sample.logits.shape:
            raise OpticNerveError(
                f"the imported model gives logits {tuple(logits.shape)}, theirs {tuple(sample.logits.shape)}"
            )
        worst = max(worst, float((logits - sample.logits).abs().max()))
    # Written so that NaN fails, too.
    if not worst < TOLERANCE:
        raise OpticNerveError(
            f"the imported model's logits differ by up to {worst:.3g} (in float32, {TOLERANCE:g} is allowed): "
            "something in this checkpoint works otherwise than its configuration says"
        )
    return worst
