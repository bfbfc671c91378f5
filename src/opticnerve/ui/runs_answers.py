"""What a run answered: question, answer, what would have been right, and the picture where a small copy was kept."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from opticnerve.data.media.open import open_image
from opticnerve.evaluation.tasks import slug
from opticnerve.types import OpticNerveError
from opticnerve.ui.runs import MEGABYTE, Run, dicts, read_file

Which = Literal["all", "wrong", "right"]
PAGE = 12
MOST_ANSWERS = 20_000
MOST_TEXT = 1000
MAX_PIXELS = 16_000_000


@dataclass(frozen=True, slots=True)
class Answer:
    """One question. `right`: None where nothing tells (a caption); a part of 1 where people disagree about it.

    `image`: the picture's place within the run's folder.
    """

    question: str
    answer: str
    truth: str
    right: float | None
    kind: str = ""
    image: str | None = None

    @property
    def wrong(self) -> bool:
        return self.right is not None and self.right < 0.5


def read_answers(run: Run, task: str) -> tuple[list[Answer], str]:
    """All answers to a task, those with a picture first; and why some are missing, or nothing.

    results.json holds some samples with small pictures, `answers/TASK.jsonl` (if the task has one) every answer.
    """
    entry = next((t for t in run.tasks if str(t.get("name")) == task), None)
    if entry is None:
        return [], ""
    shown = [_answer(s) for s in dicts(entry.get("samples"))]
    known = {(str(s.get("id")), a.question, a.answer) for s, a in zip(dicts(entry.get("samples")), shown, strict=True)}
    file, note = f"answers/{slug(task)}.jsonl", ""
    try:
        lines = read_file(run.path, file, 32 * MEGABYTE).decode("utf-8").splitlines()
    except FileNotFoundError:
        return shown, ""
    except (OSError, ValueError) as e:
        return shown, str(e)
    if len(lines) > MOST_ANSWERS:
        note = f"{file}: the first {MOST_ANSWERS:,} of {len(lines):,} answers"
    for number, line in enumerate(lines[:MOST_ANSWERS], 1):
        try:
            found = json.loads(line)
            answer = _answer(found)
        except (ValueError, AttributeError, RecursionError) as e:
            return shown, f"{file}:{number}: {e}"
        if (str(found.get("id")), answer.question, answer.answer) not in known:
            shown.append(answer)
    return shown, note


def chosen(answers: Sequence[Answer], which: Which) -> list[Answer]:
    """The wrong ones, the right ones, or all."""
    if which == "wrong":
        return [a for a in answers if a.wrong]
    if which == "right":
        return [a for a in answers if a.right is not None and not a.wrong]
    return list(answers)


def thumbnail(run: Run, image: str, side: int = 240) -> str:
    """A picture of the run as a `data:` URL, at most `side` pixels long: nothing else need be served.

    Raises:
        OpticNerveError: it is not within the run's folder, not there, too large, or no picture.
    """
    try:
        picture = open_image(read_file(run.path, image, 16 * MEGABYTE), where=image, max_pixels=MAX_PIXELS)
    except (OSError, ValueError) as e:
        raise OpticNerveError(str(e)) from e
    picture.thumbnail((side, side))
    data = io.BytesIO()
    picture.save(data, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"


def _answer(found: dict[str, Any]) -> Answer:
    right = found.get("right")
    image = found.get("image")
    return Answer(
        _text(found.get("question")), _text(found.get("prediction")), _text(found.get("answer")),
        float(right) if isinstance(right, int | float) else None, _text(found.get("type") or ""),
        image if isinstance(image, str) else None,
    )  # fmt: skip


def _text(value: Any) -> str:
    text = " ".join(str(value if value is not None else "").split())
    return text if len(text) <= MOST_TEXT else f"{text[: MOST_TEXT - 1]}…"
