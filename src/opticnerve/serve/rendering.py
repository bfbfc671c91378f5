"""Prompts that know tools: what the chat template writes of them, as tokens, with media in their places.

`data.encode` lays out conversations of which training reads every word; of tools and their results no such layout is
made, for they are asked with and not trained. What it promises holds here, too: no word of a client is dropped, and
none becomes a control token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from opticnerve.data.encode.chat_layout import ChatForm, form_of
from opticnerve.data.encode.tokenize import IGNORE, Encoded, media_blocks, picture_questions
from opticnerve.models.vlm.processing import OpticNerveProcessor
from opticnerve.serve.errors import ApiError
from opticnerve.types import Conversation

CUT = "\ue0f2"  # a character of Unicode's private use area, which no template and no text means anything by
_ESCAPED = re.compile(r"\\ue0f2", re.IGNORECASE)
_RENDERING = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def encode_with_tools(
    chat: list[dict[str, Any]], tools: list[dict[str, Any]], conversation: Conversation, processor: OpticNerveProcessor
) -> Encoded:
    """The prompt of a chat with tools, its generation prompt at its end.

    Args:
        chat, tools: as transformers' chat templates take them. conversation: the same messages, with their media.

    Raises:
        ApiError: 400: the template knows no tools, refuses the chat, or drops a message's words.
    """
    form = form_of(processor)
    control = _control(form)
    try:
        text = processor.apply_chat_template(
            _guarded(chat, control), chat_template=form.template, tools=_guarded(tools, control) or None,
            add_generation_prompt=True,
        )  # fmt: skip
    except _RENDERING as e:
        why = " ".join(str(e).split()) or type(e).__name__
        raise ApiError(400, f"the chat template refuses this conversation: {why}", param="messages") from None
    pieces = _ESCAPED.sub(CUT, str(text)).split(CUT)
    whole = "".join(pieces)
    for tool in tools:
        if tool["function"]["name"] not in whole:
            raise ApiError(400, "this model's chat template knows no tools; leave them out", param="tools")
    for i, message in enumerate(conversation.messages):
        if message.text.strip() not in whole:
            raise ApiError(
                400, f"the chat template drops the words of the {chat[i]['role']} message; it does not know such "
                "messages", param=f"messages.{i}.content",
            )  # fmt: skip
    for i, said in enumerate(chat):
        for call in said.get("tool_calls", ()):
            if call["function"]["name"] not in whole:
                raise ApiError(
                    400, "the chat template drops the assistant's tool calls; it does not know tools",
                    param=f"messages.{i}.tool_calls",
                )  # fmt: skip
    ids = _expanded(tokens_of(pieces, form), conversation, processor)
    questions = picture_questions(conversation) if processor.reads_questions else []
    return Encoded(
        ids, [IGNORE] * len(ids), conversation.images, audios=conversation.audios, questions=questions
    )  # fmt: skip


def tokens_of(pieces: Sequence[str], form: ChatForm) -> list[int]:
    """Token ids of a text in pieces, across whose borders no token reaches."""
    bos = form.tokenizer.bos_token
    ids = [] if bos is not None and pieces[0].startswith(bos) else list(form.beginning)
    for i, piece in enumerate(pieces):
        # Behind a special token a tokenizer goes on within a text: it writes no first space.
        mark = form.separator if i else ""
        out = form.tokenizer(mark + piece, add_special_tokens=False, verbose=False)["input_ids"]
        ids += out[bool(mark) :]
    return ids


def _expanded(ids: list[int], conversation: Conversation, processor: OpticNerveProcessor) -> list[int]:
    """Each placeholder becomes as many of it as its picture or sound takes."""
    blocks = media_blocks(conversation, processor)
    tokens = ((processor.image_token, processor.image_token_id), (processor.audio_token, processor.audio_token_id))
    wanted = {number: list(blocks.get(token, ())) for token, number in tokens if token is not None and number}
    for number, counts in wanted.items():
        if ids.count(number) != len(counts):
            raise ApiError(
                400, f"the chat template shows {ids.count(number)} of {len(counts)} pictures or sounds",
                param="messages",
            )  # fmt: skip
    following = {number: iter(counts) for number, counts in wanted.items()}
    return [i for number in ids for i in [number] * (next(following[number]) if number in following else 1)]


def _control(form: ChatForm) -> re.Pattern[str]:
    """Finds the first letter of what spells a control token: a special one, or one that the template writes."""
    others = (str(t) for t in form.tokenizer.added_tokens_decoder.values() if str(t) in form.template)
    words = sorted({w for w in (*form.special, *others) if w.strip()}, key=len, reverse=True)
    return re.compile("|".join(f"{re.escape(w[0])}(?={re.escape(w[1:])})" for w in words) or "(?!)")


def _guarded(value: object, control: re.Pattern[str]) -> Any:
    """Texts with a mark within every control token that they spell, at any depth of lists and dictionaries."""
    match value:
        case str():
            return control.sub(lambda m: m[0] + CUT, value)
        case list():
            return [_guarded(v, control) for v in value]
        case dict():
            return {_guarded(k, control): _guarded(v, control) for k, v in value.items()}
    return value
