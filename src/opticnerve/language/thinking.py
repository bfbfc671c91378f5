"""Think blocks: `<think>…</think>` before an answer, as reasoning models write them (Qwen3, DeepSeek-R1, QwQ, SmolLM3).

Some chat templates open the block in the generation prompt, some write an empty one before an answer, some drop what
stood in it. `thinking` of a recipe's language model settles what training and asking do:

    strip    answers are learned without their block, and the generation prompt opens none
    keep     blocks are learned with their answers
    empty    the generation prompt ends with an empty block, and the answer is learned behind it
"""

from __future__ import annotations

import re

from opticnerve.types import Thinking

OPEN, CLOSE = "<think>", "</think>"
EMPTY = "<think>\n\n</think>\n\n"
BLOCK = re.compile(r"(\s*<think>\s*)(.*?)(\s*</think>\s*)", re.DOTALL)
"""At the beginning of an answer: what opens the block, what stands in it, what closes it."""

_OPENED = re.compile(r"<think>\s*$")
_CLOSED = re.compile(r"<think>\s*</think>\s*$")
_BEGINS = re.compile(r"\s*<think>\s*")
# A block without a thought in it, at the beginning of what a model answers; the prompt may have opened it.
_THOUGHTLESS = re.compile(r"\s*(<think>)?\s*</think>\s*")


def opened(cue: str) -> str:
    """The think block that a generation prompt opens at its end; nothing where it opens none."""
    found = _OPENED.search(cue)
    return found[0] if found else ""


def closed(cue: str) -> bool:
    """Whether a generation prompt ends with an empty think block."""
    return _CLOSED.search(cue) is not None


def without_block(cue: str) -> str:
    """A generation prompt without the think block, opened or empty, at its end."""
    return _OPENED.sub("", _CLOSED.sub("", cue))


def without(answer: str) -> str:
    """An answer without the think block at its beginning."""
    found = BLOCK.match(answer)
    return answer[found.end() :] if found else answer


def behind_cue(answer: str, cue: str, thinking: Thinking) -> str | None:
    """What of an answer stands behind a generation prompt that opened a think block (`keep`) or closed an empty one
    (`empty`); None behind any other."""
    if thinking == "keep" and opened(cue):
        begun = _BEGINS.match(answer)
        return answer[begun.end() :] if begun else f"\n{CLOSE}\n\n" + answer
    thought = BLOCK.match(answer)
    return answer if thinking == "empty" and closed(cue) and not (thought and thought[2]) else None


class AnswerText:
    """The text of an answer as it is shown: without white space around it and without a think block that is empty.
    Pieces go in as they come; what is certain comes out."""

    def __init__(self) -> None:
        self._held, self._begun = "", False

    def put(self, piece: str) -> str:
        """One more piece; the text that is now certain."""
        self._held += piece
        if not self._begun:
            said = "".join(self._held.split())
            if any(block.startswith(said) for block in (OPEN + CLOSE, CLOSE)):
                return ""
            self._begun = True
            self._held = _answer(self._held)
        certain = self._held.rstrip()
        self._held = self._held[len(certain) :]
        return certain

    def end(self) -> str:
        """The rest, when no piece comes any more."""
        rest, self._held = (_answer(self._held) if not self._begun else ""), ""
        return rest.rstrip()


def shown(text: str) -> str:
    """A whole answer as it is shown."""
    return _answer(text).rstrip()


def _answer(text: str) -> str:
    found = _THOUGHTLESS.match(text)
    return (text[found.end() :] if found else text).lstrip()
