"""Which of a question's choices is the answer: by its words, its number or its letter."""

from __future__ import annotations

import ast
import json
import re
from string import ascii_uppercase
from typing import Any

from opticnerve.data.formats.fields import Fields, brief, empty, text
from opticnerve.types import DataError

_LETTER = re.compile(r"\(?([A-Za-z])[).:]?")


def choices_of(fields: Fields) -> tuple[list[Any], bool]:
    """A question's choices, and whether they are part of the question.

    `choices` are what answers are compared with, and the model does not see them. `options` (a list, or `{"A": …}`) and
    columns named A, B, C, … are options that the question is about.
    """
    names = [n for n in ("choices", "options") if not empty(fields.get(n))]
    letters = [c for c in ascii_uppercase if not empty(dict.get(fields, c))]
    lettered = len(letters) >= 2 and letters == list(ascii_uppercase[: len(letters)])
    if len(names) + lettered > 1:
        raise _wrong(f"the choices are given twice, as {' and '.join(names + letters[:1])}", "leave one out")
    if not names and not lettered:
        return [], False
    found: Any = listed(fields[names[0]]) if names else [fields[c] for c in letters]
    if isinstance(found, dict) and found.keys() == {"label", "text"}:  # {"text": […], "label": ["A", …]}, as ARC has it
        found = found["text"]
    if isinstance(found, dict):
        if list(found) != list(ascii_uppercase[: len(found)]):
            keys = ", ".join(list(found)[:8])
            raise _wrong(f"{names[0]} is an object with the keys {keys}", "name them A, B, …")
        found = [found[c] for c in list(found)]
    if found == []:
        return [], False
    if not isinstance(found, list) or len(found) < 2:
        raise DataError(f"{names[0] if names else 'A, B'} is not a list of two or more", kind="wrong-type")
    return found, names != ["choices"]


def chosen(answer: object, choices: list[Any]) -> str:
    """The words of the choice that `answer` names.

    A JSON number is a place, counted from 0; a text is a choice's words, or its letter.

    Raises:
        DataError: it names none, or could name two (kind `choices`).
    """
    words = [text(c, "entry of choices") for c in choices]
    found: set[str] = set()
    if isinstance(answer, bool) or not isinstance(answer, int | float | str):
        raise _none(answer, words)
    if isinstance(answer, str):
        found |= {w for w in words if w.strip() == answer.strip()}
        letter = _LETTER.fullmatch(answer.strip())
        place = ascii_uppercase.index(letter[1].upper()) if letter else len(words)
    else:
        # Where the choices are numbers themselves, it may be one of them.
        found |= {words[k] for k, c in enumerate(choices) if isinstance(c, int | float) and c == answer}
        place = int(answer) if answer == answer // 1 and 0 <= answer < len(words) else len(words)
    if place < len(words):
        found.add(words[place])
    if len(found) > 1:
        raise _wrong(
            f"the answer {brief(answer)} may be the choice {' or the choice '.join(sorted(found))[:200]}",
            "write the right choice's words, and choices that are texts",
        )  # fmt: skip
    if not found:
        raise _none(answer, words)
    return found.pop()


def lettered(question: str, choices: list[str]) -> str:
    """The question with its options below it, unless it names them all."""
    if all(c in question for c in choices):
        return question
    return "\n".join([question.rstrip("\n"), *with_letters(choices)])


def with_letters(choices: list[str]) -> list[str]:
    """`A. …`, `B. …`."""
    return [f"{c}. {w}" for c, w in zip(ascii_uppercase, choices, strict=False)]


def listed(value: object) -> Any:
    """The list in a text that is one, as JSON or as Python writes it: tables keep lists so (MMMU's options)."""
    if not isinstance(value, str) or not value.strip().startswith("["):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return found if isinstance(found, list) else value
    return value


def _none(answer: object, words: list[str]) -> DataError:
    if isinstance(answer, str) and answer.strip().isdecimal() and int(answer) < len(words):
        return _wrong(
            f"the answer {brief(answer)} is a number in a text, and none of the {len(words)} choices",
            'where it is a choice\'s place, counted from 0: columns.answer="{answer:place}"',
        )
    return _wrong(
        f"the answer {brief(answer)} is none of the {len(words)} choices",
        f"write one of {', '.join(w[:40] for w in words[:8])}; its letter; or its place as a JSON number, 0 to "
        f"{len(words) - 1}",
    )


def _wrong(problem: str, remedy: str) -> DataError:
    return DataError(problem, remedy=remedy, kind="choices")
