"""transformers' chat messages: `{"messages": [{"role": "user", "content": [{"type": "image", "image": "1.jpg"}, …]}]}`.

Content is a string or a list of parts `{"type": "text", "text"}`, `{"type": "image", "image"|"path"|"url"}`,
`{"type": "audio", "audio"|"path"|"url"}`. Pictures may be paths or base64 `data:` URLs. Image parts that name nothing
take the entries of the record's `images` in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from opticnerve.data.readers.fields import Context, find, missing, objects, take, text
from opticnerve.data.readers.records import Record
from opticnerve.types import Conversation, DataError, ImagePart, Message, Part, Role, TextPart

ROLES: tuple[str, ...] = get_args(Role)


def chat(record: Record, context: Context) -> Iterator[Conversation]:
    """One conversation a record."""
    where = record.where
    listed = find(record, ("images",))
    pictures = context.images(listed, where) if listed is not None else []
    said = objects(take(record, ("messages",), "conversation"), "messages", where)
    bare = sum(
        _is_bare(part) for m in said if isinstance(m.get("content"), list) for part in m["content"] if _is_image(part)
    )
    if bare != len(pictures):
        more_parts = bare > len(pictures)
        raise DataError(
            f"{bare} image part(s) name no file, and images lists {len(pictures)}",
            where=where,
            remedy='write {"type": "image", "image": "file.jpg"}, or as many images as there are parts without a file',
            kind="placeholder-without-image" if more_parts else "image-without-placeholder",
        )
    queue = iter(pictures)
    messages = tuple(_message(m, queue, context, where) for m in said)
    yield Conversation(messages, context.id(record), where)


def _message(message: dict[str, Any], pictures: Iterator[ImagePart], context: Context, where: str) -> Message:
    if message.get("role") is None or message.get("content") is None:
        raise missing(message, ("role and content",), "role and content in a message", where)
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise DataError(
            f"unknown role {role!r}", where=where, remedy=f"wanted one of {', '.join(ROLES)}", kind="unknown-role"
        )
    if isinstance(content, list):
        parts = tuple(_part(p, pictures, context, where) for p in objects(content, "content", where))
    else:
        parts = (TextPart(text(content, "content", where)),)
    return Message(role, parts)


def _part(part: dict[str, Any], pictures: Iterator[ImagePart], context: Context, where: str) -> Part:
    kind = part.get("type")
    if kind == "text":
        if part.get("text") is None:
            raise missing(part, ("text",), "text in a part of type text", where)
        return TextPart(text(part["text"], "text", where))
    if kind == "image":
        source = _source(part, "image")
        if source is None:
            return next(pictures)
        if isinstance(source, list):
            raise DataError("an image part names one picture, not a list", where=where, kind="wrong-type")
        return context.images(source, where)[0]
    if kind == "audio":
        source = _source(part, "audio")
        if source is None:
            raise missing(part, ("audio", "path"), "file in a part of type audio", where)
        return context.audio(source, where)
    raise DataError(
        f"unknown part type {kind!r}", where=where, remedy="wanted text, image or audio", kind="unknown-part"
    )


def _source(part: dict[str, Any], kind: str) -> Any:
    return next((part[name] for name in (kind, "path", "url") if part.get(name) is not None), None)


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "image"


def _is_bare(part: dict[str, Any]) -> bool:
    return _source(part, "image") is None
