"""Conversations of several turns, and instructions with their outputs.

- `chat`: transformers' `{"messages": [{"role": "user", "content": [{"type": "image", "image": "1.jpg"}, …]}]}`; content
  is a string or a list of parts: `{"type": "text", "text"}`, `{"type": "image", "image"|"path"|"url"}`, OpenAI's
  `{"type": "image_url", "image_url": {"url"}}`, and the same for video and audio. LLaMA-Factory and ms-swift write
  `<image>` in the words and list the files under `images`.
- `llava`: `{"id", "image": "1.jpg" or a list, "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
  {"from": "gpt", "value": "a circle"}]}` (github.com/haotian-liu/LLaVA, docs/Finetune_Custom_Data.md).
- `texts`: the_cauldron's and FineVision's `{"images": […], "texts": [{"user": "what?", "assistant": "a circle"}]}`.
- `instruction`: Alpaca's `{"instruction", "input", "output"}`, with LLaMA-Factory's and ms-swift's `history`, a list of
  [question, answer].
- `completion`: TRL's `{"images": ["1.jpg"], "prompt": …, "completion": …}`, both texts or messages: the completion
  alone is learned.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from opticnerve.data.formats.base import DataFormat, Sample, has
from opticnerve.data.formats.fields import Fields, brief, empty, find, objects, take, text
from opticnerve.data.formats.media import Context
from opticnerve.data.formats.turns import Turn, said, turns_of
from opticnerve.types import DataError, Role

PREFERRED = ("chosen", "rejected", "rejected_response", "rejected_messages")
"""With these it is preference data."""


class Chat(DataFormat):
    """Messages; what an evaluation asks about them (`answers`, `choices`, `type`) is passed on, so that what was
    converted can still be measured."""

    name = "chat"
    wants = "messages of role and content"
    example = (
        {"images": ["1.png"],
         "messages": [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "red"}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "1.png"}, {"type": "text", "text": "?"}]},
                      {"role": "assistant", "content": "red"}]},
    )  # fmt: skip

    def fits(self, record: dict[str, Any]) -> bool:
        return has(record, "messages") and not has(record, *PREFERRED)

    def samples(self, fields: Fields, context: Context, id: str) -> Iterator[Sample]:
        turns = turns_of(take(fields, ("messages",), "conversation"), "messages", context)
        meta: dict[str, Any] = {}
        answers, choices = fields.get("answers"), fields.get("choices")
        if isinstance(answers, list) and answers and all(isinstance(a, str) for a in answers):
            meta = {"answers": list(answers), "type": find(fields, ("type",))}
            if isinstance(choices, list) and all(isinstance(c, str) for c in choices):
                meta["choices"] = list(choices)
        yield id, turns, meta


class Llava(DataFormat):
    """LLaVA's turns of from and value; role and content are read there, too."""

    name = "llava"
    wants = "conversations of from and value"
    example = (
        {"id": "a", "image": "1.png",
         "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]},
    )  # fmt: skip

    def fits(self, record: dict[str, Any]) -> bool:
        return has(record, "conversations") and not has(record, *PREFERRED)

    def samples(self, fields: Fields, context: Context, id: str) -> Iterator[Sample]:
        yield id, turns_of(take(fields, ("conversations",), "conversation"), "conversations", context), {}


class Texts(DataFormat):
    """Pairs of what user and assistant say, about the record's pictures."""

    name = "texts"
    wants = "texts of user and assistant"
    example = ({"images": ["1.png"], "texts": [{"user": "what?", "assistant": "red"}]},)

    def fits(self, record: dict[str, Any]) -> bool:
        found = record.get("texts")
        return isinstance(found, list) and any(isinstance(t, dict) and "assistant" in t for t in found)

    def samples(self, fields: Fields, context: Context, id: str) -> Iterator[Sample]:
        turns: list[Turn] = []
        for pair in objects(take(fields, ("texts",), "conversation"), "texts"):
            if not empty(system := pair.get("system")):
                turns.append(said("system", text(system, "system")))
            turns.append(said("user", text(take(pair, ("user",), "words of the user"), "user")))
            turns.append(said("assistant", text(take(pair, ("assistant",), "answer"), "assistant")))
        yield id, turns, {}


class Instruction(DataFormat):
    """What is to be done, with what, and what was done."""

    name = "instruction"
    wants = "instruction and output; optional: input, history"
    example = (
        {"image": "1.png", "instruction": "Name the colour.", "input": "", "output": "red"},
        {"instruction": "Add.", "input": "1 + 1", "output": "2", "history": [["0 + 1", "1"]]},
    )

    def fits(self, record: dict[str, Any]) -> bool:
        return has(record, "instruction") and has(record, "output")

    def samples(self, fields: Fields, context: Context, id: str) -> Iterator[Sample]:
        words = [text(take(fields, ("instruction",), "instruction"), "instruction")]
        if not empty(more := fields.get("input")):
            words.append(text(more, "input"))
        answer = text(take(fields, ("output",), "output"), "output")
        asked = said("user", "\n".join(words))
        yield id, [*history_of(fields), asked, said("assistant", answer, tags=False)], {}


def history_of(fields: Fields) -> list[Turn]:
    """Earlier turns: a list of [question, answer].

    Raises:
        DataError: it is something else (kind `wrong-type`).
    """
    found = fields.get("history")
    turns: list[Turn] = []
    for pair in [] if empty(found) else found if isinstance(found, list) else [found]:
        if not isinstance(pair, list) or len(pair) != 2:
            problem = f"history is a list of [question, answer], this is {brief(pair)}"
            raise DataError(problem, remedy="write both in a list", kind="wrong-type")
        asked, answer = pair
        turns += [said("user", text(asked, "history")), said("assistant", text(answer, "history"), tags=False)]
    return turns


class PromptCompletion(DataFormat):
    """A prompt, and what follows it."""

    name = "completion"
    wants = "prompt and completion"
    example = (
        {"images": ["1.png"], "prompt": "<image> what?", "completion": "red"},
        {"prompt": [{"role": "user", "content": "what?"}], "completion": [{"role": "assistant", "content": "red"}]},
    )

    def fits(self, record: dict[str, Any]) -> bool:
        return has(record, "prompt") and has(record, "completion")

    def samples(self, fields: Fields, context: Context, id: str) -> Iterator[Sample]:
        asked = words_or_turns(take(fields, ("prompt",), "prompt"), "user", "prompt", context)
        for turn in asked:
            turn.learn = turn.role != "assistant"
        if isinstance(good := fields.get("label"), bool):
            raise DataError(
                f"label is {str(good).lower()}: whether the completion is a good one, which is not honoured",
                remedy="keep the good ones and take label out; or ignore: [label]", kind="weight",
            )  # fmt: skip
        answer = take(fields, ("completion",), "completion")
        yield id, [*asked, *words_or_turns(answer, "assistant", "completion", context)], {}


def words_or_turns(value: object, role: Role, what: str, context: Context) -> list[Turn]:
    """A text, which is one turn; a message; or messages."""
    if isinstance(value, Fields):
        value = [value]
    if isinstance(value, list):
        return turns_of(value, what, context)
    return [said(role, text(value, what), tags=role != "assistant")]
