"""Captions, and questions with short answers.

- `captions`: `{"image": "1.jpg", "caption": "a red circle"}`: the user shows the picture, the model says it. The
  caption: `caption`, `captions`, `text` or `comment`, the first found; the latter two only where no question or answer
  stands beside them. A list of captions makes one sample each, with ids `…#0`, `…#1`. `prompt`: what the user says.
- `vqa`: `{"image": "1.jpg", "question": "what shape?", "answer": "circle"}`. Optional: `answers` (all accepted ones:
  strings, or VQAv2's `{"answer": …}`; with them alone the most frequent one, the first of equals, is learned),
  `choices` or `options`, `hint` or `context` (stands above the question), `type` (or `answer_type`, `question_type`).
  `Conversation.meta` carries `{"answers": […], "type": …}`, and `choices` where there are some, to evaluation. Lists of
  questions (`qas`, or `questions` beside `answers`) make one sample each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from opticnerve.data.formats.base import DataFormat, Sample, about, has
from opticnerve.data.formats.choices import choices_of, chosen, lettered, listed
from opticnerve.data.formats.fields import Fields, empty, find, missing, objects, take, text
from opticnerve.data.formats.media import Context
from opticnerve.data.formats.turns import said
from opticnerve.types import DataError

CAPTION_FIELDS, VAGUE_FIELDS = ("caption", "captions"), ("text", "comment")
TYPE_FIELDS = ("type", "answer_type", "question_type")
HINT_FIELDS = ("hint", "context")
COMPANY = (
    "question", "questions", "query", "instruction", "input", "answer", "answers", "response", "output", "label",
    "labels", "choices", "options", "chosen", "rejected", "completion", "messages", "conversations", "A",
)  # fmt: skip
"""Beside these `text` is no caption."""
_WORDS_OF_A_CAPTION = ("caption", "raw", "text")


class Captions(DataFormat):
    """A picture and what is said of it."""

    name = "captions"
    wants = "a picture, and caption (or captions)"
    example = ({"image": "1.png", "caption": "a red circle"}, {"image": "2.png", "captions": ["a square", "a box"]})
    needs_media = True
    takes_prompt = True

    def fits(self, record: dict[str, Any]) -> bool:
        named = has(record, *CAPTION_FIELDS) or (has(record, *VAGUE_FIELDS) and company(record) is None)
        return about(record) and named

    def samples(self, fields: Fields, context: Context, id: str) -> Iterator[Sample]:
        if find(fields, CAPTION_FIELDS) is None and (beside := company(fields)):
            raise DataError(
                f"text beside {beside} is no caption", kind="unused-field",
                remedy=f"call it caption, or question and answer; or ignore: [{beside}]",
            )  # fmt: skip
        found = take(fields, (*CAPTION_FIELDS, *VAGUE_FIELDS), "caption")
        own_prompt = find(fields, ("prompt",))
        for number, caption in enumerate(found if isinstance(found, list) else [found]):
            own = f"{id}#{number}" if isinstance(found, list) else id
            prompt = context.prompt(own) if empty(own_prompt) else text(own_prompt, "prompt")
            if isinstance(caption, Fields):
                caption = take(caption, _WORDS_OF_A_CAPTION, "caption")
            yield own, [said("user", prompt or ""), said("assistant", text(caption, "caption"), tags=False)], {}


def company(fields: dict[str, Any]) -> str | None:
    """What shows that a `text` is part of a question."""
    return next((name for name in COMPANY if not empty(dict.get(fields, name))), None)


class Questions(DataFormat):
    """A picture, a question and its answer."""

    name = "vqa"
    wants = "a picture (or an empty field for one), question, and answer (or answers); optional: choices, options, hint"
    example = (
        {"image": "1.png", "question": "what shape?", "answer": "circle", "type": "shape"},
        {"image": "2.png", "question": "which?", "options": ["x", "y"], "answer": "B"},
        {"image": None, "question": "is water wet?", "answers": ["yes", "yes", "no"]},
    )
    needs_media = True
    may_be_blind = True

    def fits(self, record: dict[str, Any]) -> bool:
        several = has(record, "qas") or (has(record, "questions") and has(record, "answers"))
        single = has(record, "question") and has(record, "answer", "answers", "multiple_choice_answer")
        return several or single

    def samples(self, fields: Fields, context: Context, id: str) -> Iterator[Sample]:
        several = _several(fields)
        if several is None:
            yield id, *_asked(fields)
        for number, one in enumerate(several or ()):
            yield f"{id}#{number}", *_asked(one)


def _several(fields: Fields) -> list[Fields] | None:
    """The questions that a record lists: Visual Genome's `qas`, OCR-VQA's `questions` and `answers`."""
    if not empty(fields.get("qas")):
        return objects(fields["qas"], "qas")
    if not has(fields, "questions") or has(fields, "question"):
        return None
    asked, answers = listed(fields["questions"]), listed(take(fields, ("answers",), "answers"))
    if not isinstance(asked, list) or not isinstance(answers, list) or len(asked) != len(answers):
        sizes = [len(v) if isinstance(v, list) else "no list" for v in (asked, answers)]
        raise DataError(
            f"questions and answers do not belong together: {sizes[0]} and {sizes[1]}", kind="wrong-type",
            remedy="list one answer for each question",
        )  # fmt: skip
    return [Fields({"question": q, "answer": a}) for q, a in zip(asked, answers, strict=True)]


def _asked(fields: Fields) -> tuple[list[Any], dict[str, Any]]:
    """Turns and meta of one question."""
    question = text(take(fields, ("question",), "question"), "question")
    given, shown = choices_of(fields)
    choices = [text(c, "entry of choices") for c in given]
    if choices:
        answer = chosen(take(fields, ("answer",), "answer"), given)
        accepted = [answer]
    else:
        answer, accepted = _answers(fields)
    for name in reversed(HINT_FIELDS):
        if not empty(hint := fields.get(name)) and text(hint, name).strip() not in question:
            question = f"{text(hint, name).strip()}\n{question}"
    meta = {"answers": accepted, "type": find(fields, TYPE_FIELDS), **({"choices": choices} if choices else {})}
    asked = lettered(question, choices) if shown else question
    return [said("user", asked), said("assistant", answer, tags=False)], meta


def _answers(fields: Fields) -> tuple[str, list[str]]:
    several, single = listed(find(fields, ("answers",))), find(fields, ("answer", "multiple_choice_answer"))
    if isinstance(single, list):
        several, single = single, None
    if several is not None and not isinstance(several, list):
        raise DataError("answers is not a list", kind="wrong-type")
    accepted = [text(a.get("answer") if isinstance(a, dict) else a, "entry of answers") for a in several or []]
    if single is not None:
        answer = text(single, "answer")
        return answer, accepted or [answer]
    if not accepted:
        raise missing(fields, ("answer", "answers"), "answer")
    return Counter(accepted).most_common(1)[0][0], accepted
