"""What the pages write for readers of the repository, as the site wants it.

Links to files beside docs/ (recipes, CONTRIBUTING.md), which the site does not hold, keep their words and the file's
name; the file name behind a block's language becomes the block's title.
"""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(#[^)]*)?\)")
_FILE = re.compile(r"^(\s*)```(\w+) ([\w.-]+)$", flags=re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    markdown = _OUTSIDE.sub(lambda m: m[1] if m[2].endswith(m[1]) else f"{m[1]} (`{m[2]}`)", markdown)
    return _FILE.sub(r'\1```\2 title="\3"', markdown)
