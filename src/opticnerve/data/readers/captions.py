"""Captioned pictures: `{"image": "1.jpg", "caption": "a red circle"}` → the user shows the picture, the model says it.

Field names: `image`, `image_path`, `file_name` or `filepath` (`audio` or `audio_path` for sound); `caption`, `captions`
or `text`, the first found. A list of captions makes one sample each, with ids `…#0`, `…#1`.
"""

from __future__ import annotations

from collections.abc import Iterator

from opticnerve.data.readers.fields import Context, take, text
from opticnerve.data.readers.records import Record
from opticnerve.types import Conversation, Message, Part, TextPart

CAPTION_FIELDS = ("caption", "captions", "text")


def captions(record: Record, context: Context) -> Iterator[Conversation]:
    """One conversation a caption."""
    found = take(record, CAPTION_FIELDS, "caption")
    media = context.media_of(record)
    id = context.id(record)
    several = isinstance(found, list)
    for number, caption in enumerate(found if several else [found]):
        own = f"{id}#{number}" if several else id
        prompt = context.prompt(own)
        asked: tuple[Part, ...] = (*media, *([TextPart(prompt)] if prompt else []))
        said = TextPart(text(caption, "caption", record.where))
        yield Conversation((Message("user", asked), Message("assistant", (said,))), own, record.where)
