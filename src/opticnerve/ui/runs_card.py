"""A run's card as HTML that is safe to show: its Markdown rendered here, its pictures set into it.

Raw HTML is shown as the text that it is, links that run code are refused (by markdown-it), and pictures come from the
run's folder alone: a card makes no browser fetch anything.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import Any
from urllib.parse import unquote, urlsplit

from opticnerve.types import OpticNerveError
from opticnerve.ui.runs import MEGABYTE, Run, read_file
from opticnerve.ui.runs_answers import thumbnail

MOST_PICTURES = 24
_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_SUMMARY = re.compile(r"^<details><summary>([^<>]*)</summary>$", re.MULTILINE)
_ALERT = re.compile(r"^> \[!(?:WARNING|IMPORTANT|NOTE)\]$", re.MULTILINE)


def card_html(run: Run) -> str:
    """The card of a run.

    Raises:
        FileNotFoundError: none is written yet. OpticNerveError: it cannot be read.
    """
    try:
        text = read_file(run.path, "card.md", MEGABYTE).decode("utf-8")
    except UnicodeDecodeError as e:
        raise OpticNerveError(f"card.md is no text: {e}") from e
    return render(run, text)


def render(run: Run, text: str) -> str:
    """Markdown as HTML; `run` is where its pictures lie."""
    from markdown_it import MarkdownIt

    reader: Any = MarkdownIt("commonmark", {"html": False}).enable("table")
    pictures = 0

    def image(tokens: Sequence[Any], index: int, *_: Any) -> str:
        nonlocal pictures
        pictures += 1
        token = tokens[index]
        said = escape(token.content)
        source = str(token.attrs.get("src", ""))
        try:
            if pictures > MOST_PICTURES:
                raise OpticNerveError(f"more than {MOST_PICTURES} pictures")
            if urlsplit(source).scheme or source.startswith("//"):
                raise OpticNerveError("it lies outside of the run's folder")
            return f'<img class="plot" src="{thumbnail(run, unquote(source), 1000)}" alt="{said}">'
        except (OpticNerveError, ValueError) as e:
            return f'<em class="gone">[{said}: {escape(str(e))}]</em>'

    def link_open(tokens: Sequence[Any], index: int, *_: Any) -> str:
        target = str(tokens[index].attrs.get("href", ""))
        if urlsplit(target).scheme not in ("http", "https"):
            return "<span>"  # a file beside the card: the page does not serve it
        return f'<a href="{escape(target)}" rel="noopener noreferrer nofollow" target="_blank">'

    def link_close(tokens: Sequence[Any], index: int, *_: Any) -> str:
        depth = 0
        for token in reversed(tokens[:index]):
            depth += {"link_close": 1, "link_open": -1}.get(token.type, 0)
            if depth < 0:
                scheme = urlsplit(str(token.attrs.get("href", ""))).scheme
                return "</a>" if scheme in ("http", "https") else "</span>"
        return "</span>"

    def table_open(*_: Any) -> str:
        return '<div class="wide" role="group" tabindex="0"><table>'

    def table_close(*_: Any) -> str:
        return "</table></div>"

    reader.renderer.rules |= {
        "image": image, "link_open": link_open, "link_close": link_close,
        "table_open": table_open, "table_close": table_close,
    }  # fmt: skip
    return str(reader.render(_plain(text)))


def _plain(text: str) -> str:
    """Without the front matter, which is for the hub, and the few marks of GitHub's that a card has."""
    text = _MATTER.sub("", text, count=1)
    text = _ALERT.sub("> ⚠", text)
    return _SUMMARY.sub(r"**\1**", text).replace("\n</details>\n", "\n")
