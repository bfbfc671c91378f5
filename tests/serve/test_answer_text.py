"""Text as it grows: the pieces make up the whole, no half characters, stop words held back until they are none."""

from __future__ import annotations

import random
from typing import Any

import pytest

import tiny
from opticnerve.serve.sequence import IncrementalDetokenizer, token_text

TEXTS = ["what colour is the circle?", "naïve — 円は赤い 🙂🙂 ok", " spaces  and\nlines ", "e", ""]


def pieces(tokenizer: Any, ids: list[int], *stops: str) -> tuple[list[str], IncrementalDetokenizer]:
    growing = IncrementalDetokenizer(tokenizer, stops)
    found = []
    for token in ids:
        found.append(growing.put(token))
        if growing.cut is not None:
            return found, growing
    return [*found, growing.end()], growing


@pytest.mark.parametrize("kind", list(tiny.TOKENIZERS))
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_up_the_whole(kind: str, text: str) -> None:
    tokenizer = tiny.tokenizer(kind)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found, _ = pieces(tokenizer, ids)
    assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=True)
    assert all("\ufffd" not in piece for piece in found)


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    tokenizer = tiny.tokenizer()
    ids = tokenizer("円", add_special_tokens=False)["input_ids"][:-1]
    assert "".join(pieces(tokenizer, ids)[0]) == "\ufffd"


def test_stop_words_wherever_tokens_break() -> None:
    tokenizer = tiny.tokenizer()
    rng = random.Random(0)
    text = "the quick brown fox jumps over the lazy dog and a triangle is green; 円は赤い"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for _ in range(200):
        begin = rng.randrange(len(text) - 6)
        stops = [text[begin : begin + rng.randint(1, 6)], "never", text[:3] + "x", "dog!"]
        found, growing = pieces(tokenizer, ids, *stops)
        assert "".join(found) == text[: text.index(stops[0])]
        assert growing.cut == text.index(stops[0])
        for i in range(1, len(found)):
            shown = "".join(found[:i])
            assert text.startswith(shown), "what was shown is never taken back"
    assert "".join(pieces(tokenizer, ids, "dog!", "円は赤い!")[0]) == text


def test_tokens_have_bytes() -> None:
    for kind in tiny.TOKENIZERS:
        tokenizer = tiny.tokenizer(kind)
        text = "is the 円 a 🙂?"
        raw = b"".join(
            bytes(token_text(tokenizer, i)[1] or b"") for i in tokenizer(text, add_special_tokens=False)["input_ids"]
        )
        assert raw.decode().strip() == text
    assert token_text(tiny.tokenizer(), tiny.tokenizer().eos_token_id)[0] == "<|im_end|>"
