"""Patterns of paths (`shards/{000..099}.tar`, `data/*.parquet`), and which split a file of a folder belongs to, by its
name or its folders', as `datasets` reads them.

`train-00000-of-00002.parquet`, `data/test.jsonl`, `val2014/metadata.csv`. Training data and test data that lie side by
side are never read as one.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from opticnerve.data.sources.base import refused
from opticnerve.types import DataError

_WORDS = {
    "train": ("train", "training", "trn"),
    "validation": ("validation", "valid", "val", "dev", "minival"),
    "test": ("test", "testing", "testdev", "eval", "evaluation"),
    "held-out": ("held_out", "held-out", "heldout", "holdout"),
}
_NAMED = {word: split for split, words in _WORDS.items() for word in words}
_WORD = re.compile(rf"(?<![a-z0-9])({'|'.join(sorted(_NAMED, key=len, reverse=True))})(?![a-z])")
_SHARD = re.compile(r"(.+?)[-_.]\d+-of-\d+")


def matching(pattern: str, split: str | None = None) -> list[Path]:
    """The files of a pattern. What a glob finds is of one split; braces name what they mean."""
    files = [p for text in braces(pattern) for p in globbed(text)]
    return one_split(Path(pattern), files, split) if any(sign in pattern for sign in "*?[") else files


def globbed(text: str) -> list[Path]:
    """What a brace names must be there, or be missed when its turn comes; a glob finds what there is."""
    if not any(sign in text for sign in "*?["):
        return [Path(text)]
    path = Path(text)
    fixed = list(itertools.takewhile(lambda part: not any(s in part for s in "*?["), path.parts))
    root = Path(*fixed) if fixed else Path()
    return sorted(root.glob(str(Path(*path.parts[len(fixed) :]))))


def braces(text: str) -> list[str]:
    """`{000..002}` and `{a,b}` written out, as a shell does.

    >>> braces("s-{08..10}.tar")
    ['s-08.tar', 's-09.tar', 's-10.tar']
    """
    if (found := re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", text)) is None:
        return [text]
    first, last, listed = found.groups()
    if listed is not None:
        choices = listed.split(",")
    else:
        choices = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return [t for choice in choices for t in braces(text[: found.start()] + choice + text[found.end() :])]


def split_of(file: Path, folder: Path) -> str:
    """The split of a file within a folder; '' if nothing says it."""
    try:
        parts = file.relative_to(folder).parts
    except ValueError:
        parts = file.parts[-1:]
    name = parts[-1].partition(".")[0].lower() if parts else ""
    if (shard := _SHARD.fullmatch(name)) and (_WORD.search(name) or not _in(parts[:-1])):
        return shard[1]
    return _in((*parts[:-1], name))


def known_split(value: object) -> str | None:
    """The split that a record's field names, if it is one: train, validation, test, held-out or Karpathy's restval."""
    if not isinstance(value, str):
        return None
    name = value.strip().lower()
    return "restval" if name == "restval" else _NAMED.get(name)


def _in(parts: Sequence[str]) -> str:
    found = (_WORD.search(part.lower()) for part in reversed(parts))
    return next((_NAMED[f[1]] for f in found if f), "")


def one_split(folder: Path, files: Sequence[Path], split: str | None) -> list[Path]:
    """The files of one split: the one that is named, or the only one.

    Raises:
        DataError: there are several and none is named, or not the one that is.
    """
    root = folder if folder.is_dir() else Path(*folder.parts[:1])
    of = {file: split_of(file, folder if folder.is_dir() else _fixed(root, folder)) for file in files}
    names = sorted(set(of.values()))
    if split is not None:
        wanted = [f for f, s in of.items() if s == split] or [f for f, s in of.items() if s and s == _NAMED.get(split)]
        if not wanted and not (names == [""] and split == "train"):  # files of no split are one to train on
            raise _refused(folder, names, f"there is no split {split}; there are")
        return wanted or list(files)
    if len(names) > 1:
        raise _refused(folder, names, "several splits lie side by side:")
    return list(files)


def _fixed(root: Path, pattern: Path) -> Path:
    """The folders of a pattern that are written out."""
    fixed = root
    for part in pattern.parts[len(root.parts) : -1]:
        if any(sign in part for sign in "*?[{"):
            break
        fixed = fixed / part
    return fixed


def _refused(folder: Path, names: Sequence[str], problem: str) -> DataError:
    shown = ", ".join(name or "(files of no split)" for name in names[:12])
    first = "train" if "train" in names else next((n for n in names if n), "train")
    return refused(folder, f"{problem} {shown}", f"name one with hub_split: {first}, or its files")
