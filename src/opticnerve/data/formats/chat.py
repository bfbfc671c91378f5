"""Turns of a chat: transformers' `messages`, LLaVA's `conversations` (github.com/haotian-liu/LLaVA,
docs/Finetune_Custom_Data.md), and TRL's `prompt` and `completion`.

`{"messages": [{"role": "user", "content": [{"type": "image", "image": "1.jpg"}, …]}]}`; content is a string or a list
of parts: `{"type": "text", "text"}`, `{"type": "image", "image"|"path"|"url"}`, OpenAI's `{"type": "image_url",
"image_url": {"url"}}`, and the same for video and audio. LLaMA-Factory and ms-swift write `<image>` in the words and
list the files under `images`.

`{"id", "image": "1.jpg" or a list, "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
{"from": "gpt", "value": "a circle"}]}`, optionally with `system`.

`{"images": ["1.jpg"], "prompt": …, "completion": …}`, both texts or messages: the completion alone is learned.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from opticnerve.data.formats.fields import Fields, take, text
from opticnerve.data.formats.media import Context
from opticnerve.data.formats.turns import Turn, conversation, said, turns_of
from opticnerve.data.sources.base import Record
from opticnerve.types import Conversation, Role


def chat(record: Record, context: Context) -> Iterator[Conversation]:
    """One conversation a record."""
    yield _of(record, "messages", context)


def llava(record: Record, context: Context) -> Iterator[Conversation]:
    """One conversation a record; without pictures too."""
    yield _of(record, "conversations", context)


def completion(record: Record, context: Context) -> Iterator[Conversation]:
    """One conversation a record."""
    fields, where = Fields.of(record), record.where
    asked = words_or_turns(take(fields, ("prompt",), "prompt", where), "user", "prompt", context, where)
    for turn in asked:
        turn.learn = turn.role != "assistant"
    answer = take(fields, ("completion",), "completion", where)
    turns = [*asked, *words_or_turns(answer, "assistant", "completion", context, where)]
    yield conversation(fields, turns, context, where, context.id(record))


def words_or_turns(value: Any, role: Role, what: str, context: Context, where: str) -> list[Turn]:
    """A text, which is one turn, or messages."""
    if isinstance(value, list):
        return turns_of(value, what, context, where)
    return [said(role, text(value, what, where), tags=role != "assistant")]


def _of(record: Record, name: str, context: Context) -> Conversation:
    fields, where = Fields.of(record), record.where
    turns = turns_of(take(fields, (name,), "conversation", where), name, context, where)
    return conversation(fields, turns, context, where, context.id(record))
