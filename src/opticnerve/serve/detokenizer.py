"""Tokens to text as it grows: whole characters only, nothing behind a stop word; and tokens as OpenAI names them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

_HALF = "\ufffd"  # what a tokenizer writes for a character whose last bytes are still to come


class GrowingText:
    """The text of one answer.

    A piece is handed out when no later token can change it: it ends in no half character, and it cannot be the
    beginning of a stop word. (The decoding window of Hugging Face's text-generation-inference: tokenizers that write a
    space before a word need the token before it.)

    Args:
        tokenizer: of transformers. stops: words at which the answer ends; they are left out.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, list(stops)
        self.ids: list[int] = []
        self._from, self._read = 0, 0  # the window begins at one token, and is decoded up to the other
        self.text, self.given = "", 0  # decoded for certain; how much of it has been handed out
        self.cut: int | None = None  # where a stop word begins

    def put(self, token: int) -> str:
        """One more token; the text that is now certain. `cut` is set if a stop word came."""
        self.ids.append(token)
        known, now = self._decode(self._from, self._read), self._decode(self._from, len(self.ids))
        if len(now) > len(known) and not now.endswith(_HALF):
            self._from, self._read = self._read, len(self.ids)
            return self._more(now[len(known) :])
        return ""

    def end(self) -> str:
        """The rest, when no token comes any more."""
        if self.cut is None:
            known, now = self._decode(self._from, self._read), self._decode(self._from, len(self.ids))
            self._search(now[len(known) :])
        return self._give(len(self.text) if self.cut is None else self.cut)

    def _more(self, piece: str) -> str:
        self._search(piece)
        if self.cut is not None:
            return self._give(self.cut)
        held = max((_overlap(self.text, stop) for stop in self.stops), default=0)
        return self._give(len(self.text) - held)

    def _search(self, piece: str) -> None:
        old = len(self.text)
        self.text += piece
        found = [self.text.find(stop, max(0, old - len(stop) + 1)) for stop in self.stops]
        self.cut = min((at for at in found if at >= 0), default=None)

    def _give(self, until: int) -> str:
        piece = self.text[self.given : until]
        self.given = max(self.given, until)
        return piece

    def _decode(self, start: int, end: int) -> str:
        return str(self.tokenizer.decode(self.ids[start:end], skip_special_tokens=True))


def _overlap(text: str, stop: str) -> int:
    """How much of the end of `text` is the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def token_text(tokenizer: Any, token: int) -> tuple[str, list[int] | None]:
    """A token alone, as text and as UTF-8 bytes (None where the tokenizer does not tell)."""
    raw = tokenizer.convert_ids_to_tokens(token)
    text = str(tokenizer.decode([token]))
    if raw is not None and raw.startswith("▁") and not text.startswith(" "):
        text = " " + text  # SentencePiece's decoders strip the first space
    if _HALF not in text:
        return text, list(text.encode())
    if raw is not None and raw.startswith("<0x") and len(raw) == 6:
        return text, [int(raw[3:5], 16)]
    letters = _bytes_of_letters()
    return text, [letters[c] for c in raw] if raw and all(c in letters for c in raw) else None


@cache
def _bytes_of_letters() -> dict[str, int]:
    """GPT-2's letters for bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}
