"""The documents as text and fenced blocks."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DOCS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
TWINS = [ROOT / "README.ja.md", ROOT / "docs/own-data.ja.md"]  # pages in Japanese with the code of the English ones


class Block(NamedTuple):
    """A fenced block: `info` is what stands behind the fence, `where` is `file:line`, `left_out` why nobody runs it
    (`<!-- not run: … -->` on the line before the fence)."""

    where: str
    info: str
    text: str
    left_out: str

    @property
    def language(self) -> str:
        return self.info.split()[0] if self.info else ""

    @property
    def file(self) -> str:
        """What the block is a file of, the second word behind the fence."""
        return self.info.split()[1] if len(self.info.split()) == 2 else ""


@cache
def blocks(path: Path) -> list[Block]:
    found: list[Block] = []
    opened: tuple[int, str, str, str, list[str]] | None = None
    before = ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        fence = re.match(r"^(\s*)```(.*)$", line)
        if fence and opened is None:
            marker = re.fullmatch(r"\s*<!-- not run: (.+) -->\s*", before)
            opened = (number, fence[1], fence[2].strip(), marker[1] if marker else "", [])
        elif fence and opened is not None:
            start, _, info, left_out, lines = opened
            found.append(Block(f"{path.relative_to(ROOT)}:{start}", info, "\n".join(lines), left_out))
            opened = None
        elif opened is not None:
            opened[4].append(line.removeprefix(opened[1]))
        before = line
    assert opened is None, f"{path}: a fenced block is never closed"
    return found


def prose(path: Path) -> str:
    """The text without fenced blocks."""
    return re.sub(r"^\s*```.*?^\s*```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def every_block(*languages: str) -> list[Block]:
    return [b for path in DOCS for b in blocks(path) if b.language in languages]
