"""Small pieces of Markdown for the run card."""

from __future__ import annotations

import re
from pathlib import Path


def table(head: list[str], rows: list[list[str]], right: tuple[int, ...] = ()) -> str:
    """A Markdown table; `right` are the columns to be set flush right."""
    rule = ["---:" if i in right else "---" for i in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *rows])


def plain(text: object, most: int = 400) -> str:
    """Text as plain Markdown of one line: what others wrote must not become layout."""
    line = " ".join(str(text).split())
    line = line if len(line) <= most else line[: most - 1] + "…"
    # Markdown leaves underscores within words alone.
    return re.sub(r"([\\`*|<>\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", line)


def slug(name: str) -> str:
    """A name fit for a file."""
    return re.sub(r"[^\w-]+", "-", name).strip("-") or "run"


def as_typed(path: Path) -> str:
    """The folder as one would type it here; a card is shown around, so that no home folder should stand in it."""
    full, here = path.resolve(), Path.cwd().resolve()
    return full.relative_to(here).as_posix() if full != here and full.is_relative_to(here) else full.name


def percent(share: float) -> str:
    return f"{share:.1%}"


def points(difference: float) -> str:
    return f"{100 * difference:+.1f} points"
