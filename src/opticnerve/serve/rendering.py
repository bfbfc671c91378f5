"""Prompts that know tools: what the chat template writes of them, as tokens, with media in their places.

`data.encode` lays out conversations of which training reads every word; of tools and their results no such layout is
made, for they are asked with and not trained. What it promises holds here, too: no word of a client is dropped, and
none becomes a control token.
"""

from __future__ import annotations

import re
from itertools import accumulate
from typing import Any

from jinja2 import TemplateError

from opticnerve.data.encode.chat_layout import ChatForm, form_of
from opticnerve.data.encode.tokenize import IGNORE, Encoded, check_fast, expand, picture_questions, tokens_of
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
        OpticNerveError: the tokenizer is a slow one.
    """
    check_fast(processor)
    form = form_of(processor)
    try:
        text = processor.apply_chat_template(
            _guarded(chat, form), chat_template=form.template, tools=_guarded(tools, form) or None,
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
    ids, _ = tokens_of(whole, {*accumulate(map(len, pieces))}, form)
    ids, labels, _ = expand(ids, [IGNORE] * len(ids), conversation, processor)
    questions = picture_questions(conversation) if processor.reads_questions else []
    return Encoded(ids, labels, conversation.images, audios=conversation.audios, questions=questions)


def _guarded(value: object, form: ChatForm) -> Any:
    """Texts with a mark within every control token that they spell, at any depth of lists and dictionaries."""
    match value:
        case str():
            return form.part(value, CUT)
        case list():
            return [_guarded(v, form) for v in value]
        case dict():
            return {_guarded(k, form): _guarded(v, form) for k, v in value.items()}
    return value
