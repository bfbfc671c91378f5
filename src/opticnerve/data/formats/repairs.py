"""Repairs that a data entry asks for by name (`repair: [fold-system]`): what makes a conversation another one to learn
from, and is never done unasked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from opticnerve.types import Conversation, TextPart


def fold_system(conversation: Conversation) -> Conversation:
    """The system's words at the head of the first user turn, for chat templates that know no system turn (Gemma's own
    way with them: two line breaks between)."""
    messages = conversation.messages
    if len(messages) < 2 or messages[0].role != "system" or messages[1].role != "user":
        return conversation
    system, user, *rest = messages
    head = (TextPart(system.text.rstrip() + "\n\n"),) if system.text.strip() else ()
    return replace(conversation, messages=(replace(user, parts=(*head, *user.parts)), *rest))


REPAIRS: dict[str, Callable[[Conversation], Conversation]] = {"fold-system": fold_system}


def repaired(conversation: Conversation, names: Iterable[str]) -> Conversation:
    """A conversation with these repairs, in the order given."""
    for name in names:
        conversation = REPAIRS[name](conversation)
    return conversation
