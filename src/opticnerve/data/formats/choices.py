"""Which of a question's choices is the answer: by its words, its place or its letter; what could be two is an error."""

from __future__ import annotations

import re
from string import ascii_uppercase
from typing import Any

from opticnerve.data.formats.fields import Fields, brief, empty, text
from opticnerve.types import DataError

_LETTER = re.compile(r"\(?([A-Za-z])[).:]?")


def choices_of(fields: Fields, where: str) -> tuple[list[Any], bool]:
    """A question's choices, and whether they are part of the question.

    `choices` are what answers are compared with, and the model does not see them. `options` (a list, or `{"A": …}`) and
    columns named A, B, C, … are options that the question is about.
    """
    names = [n for n in ("choices", "options") if not empty(fields.get(n))]
    letters = [c for c in ascii_uppercase if not empty(dict.get(fields, c))]
    lettered = len(letters) >= 2 and letters == list(ascii_uppercase[: len(letters)])
    if len(names) + lettered > 1:
        raise _wrong(f"the choices are given twice, as {' and '.join(names + letters[:1])}", "leave one out", where)
    if not names and not lettered:
        return [], False
    found: Any = fields[names[0]] if names else [fields[c] for c in letters]
    if isinstance(found, dict):
        if list(found) != list(ascii_uppercase[: len(found)]):
            raise _wrong(
                f"{names[0]} is an object with the keys {', '.join(list(found)[:8])}", "name them A, B, …", where
            )
        found = [found[c] for c in list(found)]
    if not isinstance(found, list) or len(found) < 2:
        raise DataError(f"{names[0] if names else 'A, B'} is not a list of two or more", where=where, kind="wrong-type")
    return found, names != ["choices"]


def chosen(answer: Any, choices: list[Any], where: str) -> str:
    """The words of the choice that `answer` names.

    A JSON number is a place, counted from 0; a text is a choice's words, or its letter.

    Raises:
        DataError: it names none, or could name two (kind `choices`).
    """
    words = [text(c, "entry of choices", where) for c in choices]
    found: set[str] = set()
    if isinstance(answer, bool) or not isinstance(answer, int | float | str):
        raise _none(answer, words, where)
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
            "write the right choice's words, and choices that are texts", where,
        )  # fmt: skip
    if not found:
        raise _none(answer, words, where)
    return found.pop()


def lettered(question: str, choices: list[str]) -> str:
    """The question with its options below it, unless it names them all."""
    if all(c in question for c in choices):
        return question
    return "\n".join([question.rstrip("\n"), *(f"{c}. {w}" for c, w in zip(ascii_uppercase, choices, strict=False))])


def _none(answer: Any, words: list[str], where: str) -> DataError:
    return _wrong(
        f"the answer {brief(answer)} is none of the {len(words)} choices",
        f"write one of {', '.join(w[:40] for w in words[:8])}; its letter; or its place as a JSON number, 0 to "
        f"{len(words) - 1}",
        where,
    )


def _wrong(problem: str, remedy: str, where: str) -> DataError:
    return DataError(problem, where=where, remedy=remedy, kind="choices")
