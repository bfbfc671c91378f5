"""A map from the names of a format to those of a file: `columns: {question: query, image: meta.file}`.

What stands on the right:

- a path: a field, or one within another (`meta.file`, `turns.0.text`, `sentences.*.raw` for all of a list, and
  `text.question` within a JSON text);
- a template, which has braces: `"{hint}\\n{question}\\n{choices}"`. In it stand paths and words, no code. A line whose
  fields are all empty is left out. `{id:012d}` writes a number with zeros before it; `{choices}` are `A. …` lines
  (`{choices:words}`: with commas between); `{answer:letter}` is the letter of the choice that the answer names, and
  `{answer:place}` reads a text as a place counted from 0. Where a template for media lacks a field, there are none;
- a constant, behind an equals sign: `prompt: "=Describe the picture."`;
- a list of these, whose values make a list.

On the left `messages.role` and `messages.content` (and those of any other list) name the fields within each turn.
What is mapped is no longer there under its own name; everything else stays, and is used or refused as ever.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from opticnerve.data.formats.choices import choices_of, chosen, listed, with_letters
from opticnerve.data.formats.fields import Fields, brief, empty, text
from opticnerve.data.formats.names import kind_by_name
from opticnerve.types import DataError

Source = str | Sequence[str]
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}:]+)(?::([^{}]*))?\}")
_NUMBER = re.compile(r"0?\d{1,2}d?")
_SPECS = ("letters", "words", "letter", "place")
_CHOICES = ("choices", "options", *ascii_uppercase)
_TURN_KEYS = ("role", "content")


class Columns:
    """A map, ready for records.

    Args:
        columns: name of the format's → where it comes from. roles: speakers' names in the file → user, assistant or
            system.

    Raises:
        DataError: a template with something else in its braces (kind `columns`).
    """

    def __init__(self, columns: Mapping[str, Source], roles: Mapping[str, str] | None = None) -> None:
        self.columns, self.roles = dict(columns), dict(roles or {})
        self.whole = {k: v for k, v in self.columns.items() if "." not in k}
        self.within = {k: str(v) for k, v in self.columns.items() if "." in k}
        for name, source in self.whole.items():
            for one in listed_sources(source):
                _check(name, one)
        self.paths = [p for source in self.whole.values() for one in listed_sources(source) for p in paths_of(one)]
        self._letters = ":letter}" in str(self.whole)  # an answer is written as its choice's letter
        for name in self.within:
            if name.rpartition(".")[2] not in _TURN_KEYS:
                raise _wrong(f"columns.{name} is a name within a list", "it is messages.role or messages.content")

    def __bool__(self) -> bool:
        return bool(self.columns or self.roles)

    def missing(self, records: Sequence[dict[str, Any]]) -> tuple[str, str] | None:
        """(name, path) of the first path that none of some records has."""
        for name, source in self.whole.items():
            for path in (p for one in listed_sources(source) for p in paths_of(one)):
                if not any(found(record, path, _MISSING) is not _MISSING for record in records):
                    return name, path
        return None

    def applied(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record under the format's names.

        Raises:
            DataError: a name that is mapped is that of another field, too, which nobody reads (kind `unused-field`); a
                template that cannot be filled (kind `columns`).
        """
        made = {name: self._value(name, source, record) for name, source in self.whole.items()}
        used = list(self.paths)
        if self._letters:
            made["choices"] = list(ascii_uppercase[: len(_choices(record))])
            used += [n for n in _CHOICES if n in record]
        kept = without(record, [p for p in used if p not in _CHOICES or self._letters])
        for name in made:
            if not empty(kept.get(name)) and name in kept and name not in used:
                raise DataError(
                    f"{name} is a field of the record, too, and columns puts {self.whole.get(name)!r} in its place",
                    remedy=f"ignore: [{name}], or use it", kind="unused-field",
                )  # fmt: skip
        return self._in_turns({**kept, **{k: v for k, v in made.items() if v is not None}, **_nulls(made)})

    def _value(self, name: str, source: Source, record: dict[str, Any]) -> Any:
        if not isinstance(source, str):
            values = [self._value(name, one, record) for one in source]
            return [v for v in values if not empty(v)]
        if source.startswith("="):
            return _unescaped(source[1:])
        if "{" in source:
            return filled(source, record, whole=kind_by_name(name) is not None)
        return found(record, source, None)

    def _in_turns(self, record: dict[str, Any]) -> dict[str, Any]:
        """Turns with their speakers and words under the usual names."""
        names: dict[str, dict[str, str]] = {}
        for name, source in self.within.items():
            listed_under, _, key = name.rpartition(".")
            names.setdefault(listed_under, {})[source] = key
        for under, turns in list(record.items()):
            if isinstance(turns, list) and (under in names or self.roles):
                record[under] = [self._turn(t, names.get(under, {})) if isinstance(t, dict) else t for t in turns]
        return record

    def _turn(self, turn: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
        made = {names.get(key, key): value for key, value in turn.items()}
        for key in ("role", "from"):
            if isinstance(speaker := made.get(key), str) and speaker in self.roles:
                made[key] = self.roles[speaker]
        return made


def paths_of(source: str) -> list[str]:
    """The paths that a source reads.

    >>> paths_of("{hint}: {meta.file}")
    ['hint', 'meta.file']
    """
    if source.startswith("="):
        return []
    return [path for path, _ in _fields_of(source)] if "{" in source else [source]


def filled(template: str, record: dict[str, Any], *, whole: bool = False) -> Any:
    """A template with a record's values in it; `whole`: None unless all of them say something."""
    only = _FIELD.fullmatch(template)
    if only is not None and only[2] == "place":
        return _place(found(record, only[1], None))
    made: list[str] = []
    for line in _unescaped(template).split("\n"):
        values = [_shown(path, spec, record) for path, spec in _fields_of(line)]
        if values and (not all(values) if whole else not any(values)):
            if whole:
                return None
            continue
        queue = iter(values)
        made.append(_FIELD.sub(lambda f, q=queue: f[0][0] if f[1] is None else next(q), line))  # type: ignore[misc]
    return "\n".join(made)


def found(record: Any, path: str, default: object) -> Any:
    """What lies under a dotted path; a field whose own name has dots comes first. Nothing is noted as read."""
    if isinstance(record, dict) and path in record:
        return dict.__getitem__(record, path)
    step, _, after = path.partition(".")
    if isinstance(record, str) and record.lstrip()[:1] in ("{", "["):
        try:
            record = json.loads(record)
        except (ValueError, RecursionError):
            return default
    if isinstance(record, list):
        if step == "*":
            values = [found(item, after, None) if after else item for item in record]
            return [v for v in values if v is not None]
        if not step.isdecimal() or int(step) >= len(record):
            return default
        value = record[int(step)]
    elif isinstance(record, dict) and step in record:
        value = dict.__getitem__(record, step)
    else:
        return default
    return found(value, after, default) if after else value


def without(record: dict[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """A copy of the record without what lies under these paths."""
    made, copied = dict(record), set[str]()
    for path in paths:
        if path in made:
            del made[path]
            continue
        first, _, _ = path.partition(".")
        if first not in made:
            continue
        if isinstance(made[first], str):  # a JSON text of which something was read
            del made[first]
            continue
        if first not in copied:
            made[first] = copy.deepcopy(made[first])
            copied.add(first)
        _drop(made, path.split("."))
    return made


def _drop(value: Any, steps: list[str]) -> None:
    step, *after = steps
    inner: Iterator[Any]
    if isinstance(value, dict) and step in value:
        if not after:
            del value[step]
            return
        inner = iter([value[step]])
    elif isinstance(value, list):
        if not after:
            return
        inner = iter(value) if step == "*" else iter(value[int(step) : int(step) + 1] if step.isdecimal() else [])
    else:
        return
    for item in inner:
        _drop(item, after)


def _shown(path: str, spec: str, record: dict[str, Any]) -> str:
    """A value as a template writes it; '' where there is none."""
    value = found(record, path, None)
    if spec == "letter":
        choices = _choices(record)
        words = chosen(value, choices)
        return ascii_uppercase[[text(c, "entry of choices") for c in choices].index(words)]
    if empty(value) or value == []:
        if path in _CHOICES and spec in ("", "letters") and path not in record and (several := _choices(record)):
            return "\n".join(with_letters([text(c, "entry of choices") for c in several]))
        return ""
    if _NUMBER.fullmatch(spec):
        try:
            return format(int(value), spec if spec.endswith("d") else f"{spec}d")
        except (TypeError, ValueError) as e:
            raise _wrong(f"{{{path}:{spec}}} wants a whole number, and {path} is {brief(value)}", "write {path}") from e
    value = listed(value) if path in _CHOICES or spec in ("letters", "words") else value
    if isinstance(value, dict) and path in _CHOICES:
        value = choices_of(Fields({path: value}))[0]
    if isinstance(value, list):
        words_of = [text(v, path) for v in value]
        return ", ".join(words_of) if spec == "words" or path not in _CHOICES else "\n".join(with_letters(words_of))
    return text(value, path)


def _choices(record: dict[str, Any]) -> list[Any]:
    return choices_of(Fields({k: v for k, v in record.items() if k in _CHOICES}))[0]


def _place(value: object) -> object:
    """`"2"` → 2."""
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


def _fields_of(template: str) -> Iterator[tuple[str, str]]:
    for match in _FIELD.finditer(template):
        if match[1] is not None:
            yield match[1], match[2] or ""


def _check(name: str, source: str) -> None:
    if "{" not in source and "}" not in source:
        if not source:
            raise _wrong(f"columns.{name} is empty", "name a field, or write =words for a constant")
        return
    if source.startswith("="):
        return
    plain = _FIELD.sub("", source)
    specs = [spec for _, spec in _fields_of(source)]
    if "{" in plain or "}" in plain:
        raise _wrong(f"columns.{name}: a brace of {source[:80]!r} is not closed", "write {{ for a brace")
    if strange := next((s for s in specs if s and s not in _SPECS and not _NUMBER.fullmatch(s)), None):
        raise _wrong(f"columns.{name}: {strange[:40]!r} behind a colon", f"wanted {', '.join(_SPECS)} or digits (012d)")


def listed_sources(source: Source) -> list[str]:
    """One source, or several whose values make a list."""
    return [source] if isinstance(source, str) else list(source)


def _nulls(made: dict[str, Any]) -> dict[str, Any]:
    """Fields for media that name none: they say that there is no picture."""
    return {k: None for k, v in made.items() if v is None and kind_by_name(k)}


def _unescaped(template: str) -> str:
    r"""`\n` as two characters, as a shell gives it, is a new line."""
    return template.replace("\\n", "\n").replace("\\t", "\t")


def _wrong(problem: str, remedy: str) -> DataError:
    return DataError(problem, remedy=remedy, kind="columns")


_MISSING = object()
