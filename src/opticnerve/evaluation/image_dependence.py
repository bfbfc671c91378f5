"""Does the answer depend on the picture at all?

Many questions can be guessed from their words ("is the sky blue?"), so a model may score well with its vision encoder
shut. The same questions are therefore asked three times: with the real picture, with a blank one, and with another
sample's picture. What the vision encoder contributes is the difference. Of videos they are asked a fourth time, with
the clip's own frames in another order: what a model knows of time is that difference.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image

from opticnerve.data.media.open import open_image
from opticnerve.evaluation.metrics import normalise_answer, summarise
from opticnerve.evaluation.tasks import Generate, Progress, answer_all, score_answers
from opticnerve.types import Conversation, Frame, ImagePart, OpticNerveError

# Not the picture's own mean colour, which would give away the answer to "what colour is it?".
GREY = (128, 128, 128)


def image_dependence(
    generate: Generate, conversations: Sequence[Conversation], *, seed: int = 0, progress: Progress | None = None
) -> dict[str, Any]:
    """Accuracy on the same questions with the real, a blank and a shuffled picture; of videos with shuffled frames.

    Args:
        conversations: questions with pictures and references (as for `tasks.run_vqa`), from at least two pictures.
        seed: fixes which picture takes the place of which. progress: over all three passes.

    Returns: `n`, the accuracies `real`, `blank`, `shuffled` (another's picture, another's video frame by frame), where
        there are videos `shuffled_frames` (their own frames in another order, at the times of the first), their `ci95`
        by the same names, and `real_minus_blank`.

    Raises:
        OpticNerveError: no questions, a question without a picture, or only one picture (there is none to swap with).
    """
    for c in conversations:
        if not c.prompt().images:
            raise OpticNerveError(
                f"{c.where or c.id or 'a question'} shows no picture: image dependence needs one in each",
                kind="missing-field",
            )
    partner = deranged_pictures(conversations, seed)
    changes: dict[str, Callable[[ImagePart, str], ImagePart]] = {
        "real": lambda part, where: part,
        "blank": blank_picture,
        "shuffled": lambda part, where: _exchanged(part, partner[_key(part)]),
    }
    if any(isinstance(i.source, Frame) and i.source.of > 1 for c in conversations for i in c.images):
        changes["shuffled_frames"] = lambda part, where: _reordered(part, seed)
    result: dict[str, Any] = {"n": len(conversations)}
    intervals: dict[str, list[float]] = {}
    for done, (name, change) in enumerate(changes.items()):
        seen = [with_pictures(c, change) for c in conversations]

        def report(k: int, n: int, done: int = done) -> None:
            if progress is not None:
                progress(done * n + k, len(changes) * n)

        scored = summarise(score_answers(seen, answer_all(generate, seen, report)))
        result[name], intervals[name] = scored["accuracy"], scored["ci95"]
    return {**result, "ci95": intervals, "real_minus_blank": result["real"] - result["blank"], "seed": seed}


def balanced(conversations: Sequence[Conversation], count: int, *, seed: int = 0) -> list[Conversation]:
    """Up to about `count` questions in which the words alone give no clue: each question comes with each of its answers
    equally often, about different pictures (the balancing of VQA v2, Goyal et al. 2017, section 3). Questions that have
    one answer only are left out."""
    rng = random.Random(seed)
    by_question: dict[str, dict[str, list[Conversation]]] = {}
    for c in conversations:
        key = c.prompt().messages[-1].text.strip().lower()
        by_question.setdefault(key, {}).setdefault(normalise_answer(c.answer or ""), []).append(c)
    sets: list[list[Conversation]] = []
    for answers in by_question.values():
        if len(answers) > 1:
            shuffled = [rng.sample(found, len(found)) for found in answers.values()]
            sets += [list(one_of_each) for one_of_each in zip(*shuffled, strict=False)]
    rng.shuffle(sets)
    chosen: list[Conversation] = []
    for one_of_each in sets:
        if len(chosen) >= count:
            break
        chosen += one_of_each
    return chosen


def with_pictures(c: Conversation, change: Callable[[ImagePart, str], ImagePart]) -> Conversation:
    """The same conversation with every picture changed; `change` is given the picture and where it comes from. What is
    written before it stays."""
    where = c.where or c.id
    messages = tuple(
        replace(
            m, parts=tuple(replace(p, source=change(p, where).source) if isinstance(p, ImagePart) else p
                           for p in m.parts),
        )
        for m in c.messages
    )  # fmt: skip
    return replace(c, messages=messages)


def blank_picture(part: ImagePart, where: str = "") -> ImagePart:
    """A grey picture of the same size."""
    return ImagePart(PIL.Image.new("RGB", open_image(part.source, where=where).size, GREY))


def deranged_pictures(conversations: Sequence[Conversation], seed: int = 0) -> dict[str, ImagePart]:
    """For each distinct picture (by its source; of a video its last frame) another one: a derangement, the same for the
    same pictures and seed. Ten questions about one picture all meet the same wrong one."""
    pictures = {_key(p): p for c in conversations for p in c.images}
    if len(pictures) < 2:
        raise OpticNerveError(
            f"image dependence needs questions about at least two pictures, got {len(pictures)}", kind="out-of-range"
        )
    order = sorted(pictures)
    random.Random(seed).shuffle(order)
    # In a shuffled circle, everybody's neighbour is somebody else.
    return {key: pictures[order[i - 1]] for i, key in enumerate(order)}


def _exchanged(part: ImagePart, other: ImagePart) -> ImagePart:
    """The partner of a picture; of a frame its partner's at the same part of the whole."""
    if isinstance(part.source, Frame) and isinstance(other.source, Frame):
        index = part.source.index * other.source.of // part.source.of
        return ImagePart(replace(other.source, index=index))
    return other


def _reordered(part: ImagePart, seed: int) -> ImagePart:
    """The frame that takes the place of one: in a shuffled circle, everybody's neighbour is somebody else."""
    if not isinstance(part.source, Frame):
        return part
    order = list(range(part.source.of))
    random.Random(f"{seed} {_key(part)}").shuffle(order)
    return ImagePart(replace(part.source, index=order[order.index(part.source.index) - 1]))


def _key(part: ImagePart) -> str:
    source = part.source
    if isinstance(source, Frame):
        source = source.source  # all of a video have one partner
    if isinstance(source, Path):
        return f"file {source.resolve()}"
    data = source if isinstance(source, bytes) else f"{source.mode} {source.size}".encode() + source.tobytes()
    return f"bytes {hashlib.sha256(data).hexdigest()}"
