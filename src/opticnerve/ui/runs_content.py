"""What a run answered, and its card as HTML that is safe to show.

Of an answer: the question, what would have been right, and the picture where a small copy was kept. Of a card: its
Markdown rendered here, its pictures set into it. Raw HTML is shown as the text that it is, links that run code are
refused (by markdown-it), and pictures come from the run's folder alone: a card makes no browser fetch anything.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from opticnerve.data.media.open import open_image
from opticnerve.evaluation.tasks import slug
from opticnerve.types import OpticNerveError
from opticnerve.ui.runs import MEGABYTE, ShownRun, dicts, read_file

Which = Literal["all", "wrong", "right"]
PAGE = 12
MOST_ANSWERS = 20_000
MOST_TEXT = 1000
MAX_PIXELS = 16_000_000


@dataclass(frozen=True, slots=True)
class RunAnswer:
    """One question. `right`: None where nothing tells (a caption); a part of 1 where people disagree about it.

    `image`: the picture's place within the run's folder.
    """

    question: str
    answer: str
    truth: str
    right: float | None
    image: str | None = None

    @property
    def wrong(self) -> bool:
        return self.right is not None and self.right < 0.5


def read_answers(run: ShownRun, task: str) -> tuple[list[RunAnswer], str]:
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


def chosen(answers: Sequence[RunAnswer], which: Which) -> list[RunAnswer]:
    """The wrong ones, the right ones, or all."""
    if which == "wrong":
        return [a for a in answers if a.wrong]
    if which == "right":
        return [a for a in answers if a.right is not None and not a.wrong]
    return list(answers)


def thumbnail(run: ShownRun, image: str, side: int = 240) -> str:
    """A picture of the run as a `data:` URL, at most `side` pixels long: nothing else need be served. Raises
    OpticNerveError: it is not within the run's folder, not there, too large, or no picture."""
    try:
        picture = open_image(read_file(run.path, image, 16 * MEGABYTE), where=image, max_pixels=MAX_PIXELS)
    except OpticNerveError:
        raise
    except (OSError, ValueError) as e:
        raise OpticNerveError(str(e), kind="damaged") from e
    picture.thumbnail((side, side))
    data = io.BytesIO()
    picture.save(data, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"


def _answer(found: dict[str, Any]) -> RunAnswer:
    right = found.get("right")
    image = found.get("image")
    return RunAnswer(
        _text(found.get("question")), _text(found.get("prediction")), _text(found.get("answer")),
        float(right) if isinstance(right, int | float) else None,
        image if isinstance(image, str) else None,
    )  # fmt: skip


def _text(value: object) -> str:
    text = " ".join(str(value if value is not None else "").split())
    return text if len(text) <= MOST_TEXT else f"{text[: MOST_TEXT - 1]}…"


MOST_PICTURES = 24
_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_SUMMARY = re.compile(r"^<details><summary>([^<>]*)</summary>$", re.MULTILINE)
_ALERT = re.compile(r"^> \[!(?:WARNING|IMPORTANT|NOTE)\]$", re.MULTILINE)


def card_html(run: ShownRun) -> str:
    """The card of a run.

    Raises:
        FileNotFoundError: none is written yet. OpticNerveError: it cannot be read.
    """
    try:
        text = read_file(run.path, "card.md", MEGABYTE).decode("utf-8")
    except UnicodeDecodeError as e:
        raise OpticNerveError(f"card.md is no text: {e}", kind="damaged") from e
    return render(run, text)


def render(run: ShownRun, text: str) -> str:
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
                raise OpticNerveError(f"more than {MOST_PICTURES} pictures", kind="too-large")
            if urlsplit(source).scheme or source.startswith("//"):
                raise OpticNerveError("it lies outside of the run's folder", kind="no-permission")
            return f'<img class="plot" src="{thumbnail(run, unquote(source), 1000)}" alt="{said}">'
        except (OpticNerveError, ValueError) as e:
            return f'<em class="gone">[{said}: {escape(str(e))}]</em>'

    closers: list[str] = []

    def link_open(tokens: Sequence[Any], index: int, *_: Any) -> str:
        target = str(tokens[index].attrs.get("href", ""))
        web = urlsplit(target).scheme in ("http", "https")
        closers.append("</a>" if web else "</span>")
        if not web:
            return "<span>"  # a file beside the card: the page does not serve it
        return f'<a href="{escape(target)}" rel="noopener noreferrer nofollow" target="_blank">'

    reader.renderer.rules |= {
        "image": image, "link_open": link_open, "link_close": lambda *_: closers.pop(),
        "table_open": lambda *_: '<div class="wide" role="group" tabindex="0"><table>',
        "table_close": lambda *_: "</table></div>",
    }  # fmt: skip
    return str(reader.render(_plain(text)))


def _plain(text: str) -> str:
    """Without the front matter, which is for the hub, and the few marks of GitHub's that a card has."""
    text = _MATTER.sub("", text, count=1)
    text = _ALERT.sub("> ⚠", text)
    return _SUMMARY.sub(r"**\1**", text).replace("\n</details>\n", "\n")
