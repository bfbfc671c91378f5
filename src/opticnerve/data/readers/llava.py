"""LLaVA's conversation JSON (github.com/haotian-liu/LLaVA, docs/Finetune_Custom_Data.md).

`{"id", "image": "1.jpg" or a list, "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
{"from": "gpt", "value": "a circle"}]}`, optionally with `system`. Each `<image>` becomes the next picture, at its
place; the line break which sets it off from the words goes with it. In a record with `video` (a file, or a list of
several) instead of `image`, each `<video>` or `<image>` becomes the frames of the next video, as in LLaVA-NeXT's data.
"""

from __future__ import annotations

from collections.abc import Iterator

from opticnerve.data.readers.fields import Context, find, missing, objects, take, text
from opticnerve.data.readers.records import Record
from opticnerve.data.readers.rules import IMAGE_MARKER
from opticnerve.types import Conversation, DataError, ImagePart, Message, Part, Role, TextPart

VIDEO_MARKER = "<video>"
ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def llava(record: Record, context: Context) -> Iterator[Conversation]:
    """One conversation a record; without pictures too."""
    where = record.where
    turns: list[tuple[Role, str]] = []
    if (system := find(record, ("system",))) is not None:
        turns.append(("system", text(system, "system", where)))
    for turn in objects(take(record, ("conversations",), "conversation"), "conversations", where):
        if turn.get("from") is None or turn.get("value") is None:
            raise missing(turn, ("from and value",), "speaker and words in a turn", where)
        turns.append((_role(text(turn["from"], "from", where), where), text(turn["value"], "value", where)))

    given, video = find(record, ("image", "images")), find(record, ("video", "videos"))
    if given in (None, "") and video is not None:
        clips = [context.video(v, where) for v in (video if isinstance(video, list) else [video])]
        turns = [(role, words.replace(VIDEO_MARKER, IMAGE_MARKER)) for role, words in turns]
        _check_counts(_markers(turns), len(clips), where, "video")
        turns = [(role, words.replace(IMAGE_MARKER, IMAGE_MARKER * context.frames)) for role, words in turns]
        pictures = [frame for clip in clips for frame in clip]
    else:
        pictures = context.images(given, where) if given is not None and given != "" else []
        _check_counts(_markers(turns), len(pictures), where, "picture")
    queue = iter(pictures)
    messages = tuple(Message(role, _parts(words, queue)) for role, words in turns)
    yield Conversation(messages, context.id(record), where)


def _markers(turns: list[tuple[Role, str]]) -> int:
    return sum(words.count(IMAGE_MARKER) for _, words in turns)


def _parts(words: str, pictures: Iterator[ImagePart]) -> tuple[Part, ...]:
    """The text with each marker replaced by the next picture, and one line break beside each marker gone.

    The break after the marker if there is one (`<image>\\nQuestion`), else the one before (`Question\\n<image>`).
    """
    pieces = words.split(IMAGE_MARKER)
    for i in range(1, len(pieces)):
        if pieces[i].startswith("\n"):
            pieces[i] = pieces[i][1:]
        elif pieces[i - 1].endswith("\n"):
            pieces[i - 1] = pieces[i - 1][:-1]
    parts: list[Part] = []
    for i, piece in enumerate(pieces):
        if i > 0:
            parts.append(next(pictures))
        if piece:
            parts.append(TextPart(piece))
    return tuple(parts)


def _check_counts(markers: int, given: int, where: str, what: str) -> None:
    if markers < given:
        raise DataError(
            f"{given} {what}(s) but {markers} {IMAGE_MARKER} in the text",
            where=where,
            remedy=f"write {IMAGE_MARKER} in a human turn where each {what} belongs",
            kind="image-without-placeholder",
        )
    if markers > given:
        raise DataError(
            f"{markers} {IMAGE_MARKER} in the text but {given} {what}(s)",
            where=where,
            remedy=f"name the {what} in the field {'image' if what == 'picture' else what}, or remove the marker",
            kind="placeholder-without-image",
        )


def _role(name: str, where: str) -> Role:
    if name not in ROLES:
        raise DataError(
            f"unknown speaker {name!r}", where=where, remedy=f"wanted one of {', '.join(ROLES)}", kind="unknown-role"
        )
    return ROLES[name]
