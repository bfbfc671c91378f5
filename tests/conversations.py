"""Conversations by the hundred from a seed: what people ask and data answer, where tokenizers and templates stumble."""

from __future__ import annotations

import random
from dataclasses import dataclass

import tiny
from opticnerve.types import Conversation, ImagePart, Message, Part, TextPart

# How words begin and end decides what a tokenizer joins to the template's own: letters, digits, scripts that no space
# parts, punctuation, white space, bytes of an emoji.
ANSWERS = (
    "ruby", "a dog", "It's red.", "Yes", "no", "42", "7", "3.14", "-1", "0", "1,024 pixels", "100 %", "犬です", "赤", "狐です。",
    "12月", "３匹", "한국어", "שלום", "Это кот", "مرحبا", "नमस्ते", "(a) frog", "...", "?", "!", "“quoted”", "'s", "$5", "#1",
    "@home", "*bold*", "- one\n- two", "<b>red</b>", "{{ x }}", "{% if %}", "a_b", "C++", "▁", "Ġ", "🦊", "👩‍👩‍👧 three", "x 🦊",
    "```python\n    x = 1\n```", "    indented", "\ttab", "def f(x):\n\treturn x\n", "line one\nline two\n\nline four",
    "É", "naïve", "A", "a", "I", "user", "assistant", "ASSISTANT: no", "model", "\u200bzero", "ﬁ", "①",
)  # fmt: skip
# Around any of them.
EDGES = ("", "", "", "", "", "", " ", "  ", "\n", "\n\n", " \n", "\t")
BARE = ("", " ", "\n")
QUESTIONS = (
    "Which?", "What colour is it?", "これは何ですか？", "What is 3 + 4?", "How many dogs: 1, 2 or 3?", "user", "assistant",
    "USER: is it?", "Describe the picture.", "  two spaces", "trailing ", "line\nbreak", "code:\n```\nx = 1\n```", "12",
    "犬", "🦊?", "(b)", "Question:", "Why?\n", "\n\nhm", "a|b", "<b>bold</b> words", "What does 'model' mean?",
)  # fmt: skip
SYSTEMS = ("Be brief.", "You are a helpful assistant.", "答えは短く。", "Rule 1: no lies.\nRule 2: none.", "7")
THOUGHTS = ("hm", "It is red, I think.\nSo:", "1 + 1 = 2", "犬か狐か", "a\n\nb")
PICTURES = tuple(ImagePart(tiny.picture(i, size=8)) for i in range(4))


@dataclass(frozen=True)
class Sample:
    """A conversation and what is special about it. `thinks`: the numbers of the assistant's turns that think."""

    conversation: Conversation
    thinks: tuple[int, ...] = ()

    @property
    def system(self) -> str | None:
        first = self.conversation.messages[0]
        return first.text if first.role == "system" else None


def samples(count: int, *, seed: int = 0) -> list[Sample]:
    """The same conversations for the same seed."""
    return [_sample(random.Random(f"{seed}-{i}"), i) for i in range(count)]


def _sample(chance: random.Random, number: int) -> Sample:
    turns = chance.choice((1, 1, 1, 2, 2, 3, 4))
    messages = [Message("system", (TextPart(chance.choice(SYSTEMS)),))] if chance.random() < 0.25 else []
    thinks = []
    for turn in range(turns):
        messages.append(Message("user", _asked(chance)))
        answer = chance.choice(ANSWERS)
        if chance.random() < 0.5:
            answer = chance.choice(EDGES) + answer + chance.choice(EDGES)
        elif chance.random() < 0.03:
            answer = chance.choice(BARE)
        if chance.random() < (0.1 if turn == turns - 1 else 0.03):
            answer = f"<think>\n{chance.choice(THOUGHTS)}\n</think>\n\n{answer.strip() or 'so'}"
            thinks.append(turn)
        # An answer that is read and not learned, but for the last: something must be.
        learn = turn == turns - 1 or chance.random() > 0.1
        messages.append(Message("assistant", (TextPart(answer),), learn))
    return Sample(Conversation(tuple(messages), id=f"{number}", where=f"made.jsonl:{number}"), tuple(thinks))


def _asked(chance: random.Random) -> tuple[Part, ...]:
    """Words, and pictures before, between and behind them."""
    parts: list[Part] = []
    for piece in range(chance.choice((1, 1, 1, 2))):
        if chance.random() < (0.45 if piece == 0 else 0.7):
            parts += [chance.choice(PICTURES) for _ in range(chance.choice((1, 1, 2)))]
        parts.append(TextPart(chance.choice(QUESTIONS)))
    if chance.random() < 0.15:
        if chance.random() < 0.5:
            parts[-1] = TextPart("Question\n")
        parts.append(chance.choice(PICTURES))
    return tuple(parts)
