"""transformers' chat messages: `{"messages": [{"role": "user", "content": [{"type": "image", "image": "1.jpg"}, …]}]}`.

Content is a string or a list of parts `{"type": "text", "text"}`, `{"type": "image", "image"|"path"|"url"}`,
`{"type": "video", "video"|"path"|"url"}`, `{"type": "audio", "audio"|"path"|"url"}`. Pictures may be paths or base64
`data:` URLs. A video becomes some of its frames, as pictures. Image and video parts that name nothing take the entries
of the record's `images` and `videos` in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from opticnerve.data.readers.fields import Context, find, missing, objects, take, text
from opticnerve.data.readers.records import Record
from opticnerve.types import Conversation, DataError, Message, Part, Role, TextPart

ROLES: tuple[str, ...] = get_args(Role)


def chat(record: Record, context: Context) -> Iterator[Conversation]:
    """One conversation a record."""
    where = record.where
    said = objects(take(record, ("messages",), "conversation"), "messages", where)
    listed = {kind: _listed(record, kind, said, where) for kind in ("image", "video")}
    messages = tuple(_message(m, listed, context, where) for m in said)
    yield Conversation(messages, context.id(record), where)


def _listed(record: Record, kind: str, said: list[dict[str, Any]], where: str) -> Iterator[Any]:
    """The record's `images` (or `videos`), one for each part that names no file of its own."""
    found = find(record, (f"{kind}s",))
    entries = found if isinstance(found, list) else [] if found is None else [found]
    contents = [m["content"] for m in said if isinstance(m.get("content"), list)]
    bare = sum(_is_bare(part, kind) for content in contents for part in content)
    if bare != len(entries):
        raise DataError(
            f"{bare} {kind} part(s) name no file, and {kind}s lists {len(entries)}",
            where=where,
            remedy=f'write {{"type": "{kind}", "{kind}": "a file"}}, or as many {kind}s as there are such parts',
            kind="placeholder-without-image" if bare > len(entries) else "image-without-placeholder",
        )
    return iter(entries)


def _message(message: dict[str, Any], listed: dict[str, Iterator[Any]], context: Context, where: str) -> Message:
    if message.get("role") is None or message.get("content") is None:
        raise missing(message, ("role and content",), "role and content in a message", where)
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise DataError(
            f"unknown role {role!r}", where=where, remedy=f"wanted one of {', '.join(ROLES)}", kind="unknown-role"
        )
    if isinstance(content, list):
        parts = tuple(made for p in objects(content, "content", where) for made in _parts(p, listed, context, where))
    else:
        parts = (TextPart(text(content, "content", where)),)
    return Message(role, parts)


def _parts(part: dict[str, Any], listed: dict[str, Iterator[Any]], context: Context, where: str) -> Sequence[Part]:
    """One part, or as many as a video has frames."""
    kind = part.get("type")
    if kind == "text":
        if part.get("text") is None:
            raise missing(part, ("text",), "text in a part of type text", where)
        return [TextPart(text(part["text"], "text", where))]
    if kind not in ("image", "video", "audio"):
        raise DataError(
            f"unknown part type {kind!r}", where=where, remedy="wanted text, image, video or audio", kind="unknown-part"
        )
    source = _source(part, kind)
    if kind == "audio":
        if source is None:
            raise missing(part, ("audio", "path"), "file in a part of type audio", where)
        return [context.audio(source, where)]
    source = next(listed[kind]) if source is None else source
    if kind == "video":
        return context.video(source, where)
    if isinstance(source, list):
        raise DataError("an image part names one picture, not a list", where=where, kind="wrong-type")
    return context.images(source, where)


def _source(part: dict[str, Any], kind: str) -> Any:
    return next((part[name] for name in (kind, "path", "url") if part.get(name) is not None), None)


def _is_bare(part: Any, kind: str) -> bool:
    return isinstance(part, dict) and part.get("type") == kind and _source(part, kind) is None
