"""The skeleton of a conversation: messages with marks in place of words, and what a template writes around them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from opticnerve.language import thinking
from opticnerve.types import AudioPart, ImagePart, Message, TextPart

# Characters of Unicode's private use area: no template, no tokenizer and no text means anything by them.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"
MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


@dataclass(frozen=True)
class Skeleton:
    """`pieces`: what the template writes before each mark; `order`: the marks as they come; `tail`: what stands behind
    the last one. By assistant's turn: `gaps`, what stands between its generation prompt and its first mark; `ends`, how
    many letters behind its last mark are learned."""

    pieces: list[str]
    order: list[int]
    tail: str
    gaps: dict[int, str] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)

    def behind(self, mark: int) -> str:
        """What the template writes behind a mark, up to the next one."""
        return [*self.pieces, self.tail][self.order.index(mark) + 1]


@dataclass(frozen=True, slots=True)
class SkeletonTurn:
    """A message of a skeleton: its `content`, as (type, text with marks), and the numbers of its marks. `tools`: what
    it says of tools, as JSON; `calls`: how many of its marks stand in calls, as the last ones."""

    role: str
    content: tuple[tuple[str, str], ...]
    marks: tuple[int, ...]
    learn: bool = True
    tools: str = "{}"
    calls: int = 0

    @property
    def said(self) -> str:
        return "".join(text for _, text in self.content)

    def chat(self) -> dict[str, Any]:
        """As templates take it."""
        parts = [{"type": kind, "text": text} if kind == "text" else {"type": kind} for kind, text in self.content]
        return {"role": self.role, "content": parts, **json.loads(self.tools)}


def mark(number: int) -> str:
    return f"{_OPEN}{number}{_CLOSE}"


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def plain(message: Message) -> dict[str, Any]:
    """A message as templates take it, its media without their contents."""
    content = [text_part(p.text) if isinstance(p, TextPart) else {"type": _kind(p)} for p in message.parts]
    return {"role": message.role, "content": content, **message.tool_fields()}


def _kind(part: ImagePart | AudioPart) -> str:
    return "image" if isinstance(part, ImagePart) else "audio"


def marked(
    messages: Sequence[Message], roles: Sequence[str] = ("system", "user", "assistant", "tool")
) -> tuple[list[SkeletonTurn], list[str]]:
    """The messages with marks for the words of these roles, and the words. Words that are white space alone are left
    as they are, for templates ask whether there are any; an assistant's are marked all the same, unless it calls a
    tool: then the tool's name and every text among its arguments are."""
    turns: list[SkeletonTurn] = []
    words: list[str] = []
    for message in messages:
        content: list[tuple[str, str]] = []
        marks: list[int] = []

        def put(text: str, marks: list[int] = marks) -> str:
            marks.append(len(words))
            words.append(text)
            return mark(marks[-1])

        parts = message.parts
        if message.role == "assistant" and not message.calls:
            parts = parts or (TextPart(""),)
        for part in parts:
            if not isinstance(part, TextPart):
                content.append((_kind(part), ""))
            elif message.role not in roles or (
                (message.role != "assistant" or message.calls) and not part.text.strip()
            ):
                content.append(("text", part.text))
            elif message.role == "assistant" and (thought := thinking.BLOCK.match(part.text)):
                before, inside, behind = thought.groups()
                block = before + (put(inside) if inside else "") + behind
                content.append(("text", block + put(part.text[thought.end() :])))
            else:
                content.append(("text", put(part.text)))
        said = len(marks)
        about = message.tool_fields()
        for call in about.get("tool_calls", ()):
            function = call["function"]
            function["name"], function["arguments"] = put(function["name"]), _with_marks(function["arguments"], put)
        about_text = json.dumps(about, ensure_ascii=False)
        turns.append(
            SkeletonTurn(message.role, tuple(content), tuple(marks), message.learn, about_text, len(marks) - said)
        )
    return turns, words


def _with_marks(value: Any, put: Callable[[str], str]) -> Any:
    """JSON with marks for the texts in it; keys stay, for they are the tool's."""
    if isinstance(value, dict):
        return {k: _with_marks(v, put) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_marks(v, put) for v in value]
    return put(value) if isinstance(value, str) else value


def trimmed(said: str) -> Iterator[str]:
    """Words as they are, and as templates trim them: of some kind of white space, or of all, at either end; and within
    JSON, as a tool's arguments and results are written. No other change of people's words goes unnoticed."""
    yield said
    kinds = ("", "\n", " \t", " ", " \n", None)
    yield from dict.fromkeys(said.lstrip(left).rstrip(right) for left in kinds for right in kinds)
    yield json.dumps(said, ensure_ascii=False)[1:-1]
