"""Conversations of any layout written as chat records: JSON lines, Parquet, or webdataset shards.

What is learned, which answers are preferred and what an evaluation asks goes along, so that the new file gives the same
samples. JSON lines name media by paths from their own folder, and what lies elsewhere (or nowhere: bytes) is copied
into `<name>_media` beside them; Parquet and shards hold the bytes. A file is whole or not there.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from opticnerve.common import atomic
from opticnerve.data.media.files import KINDS
from opticnerve.types import AudioPart, Conversation, DataError, Frame, ImagePart, Message, OpticNerveError, TextPart

SUFFIXES = (".jsonl", ".parquet", ".tar")
_ROWS = 256  # of a group of Parquet's
_BEGINNINGS = (
    (b"\x89PNG", "png"), (b"\xff\xd8", "jpg"), (b"GIF8", "gif"), (b"BM", "bmp"), (b"II*\0", "tiff"), (b"MM\0*", "tiff"),
    (b"fLaC", "flac"), (b"OggS", "ogg"), (b"ID3", "mp3"), (b"\xff\xfb", "mp3"),
)  # fmt: skip

Refer = Callable[[str, Path | bytes], dict[str, Any]]
"""From kind and source of a medium to what its part says of it."""


def convert(conversations: Iterable[Conversation], out: Path) -> int:
    """Write conversations by the ending of `out`, and say how many there were.

    Raises:
        OpticNerveError: `out` is there already, or has another ending.
        DataError: a sample that cannot be written so.
    """
    if out.suffix not in SUFFIXES:
        problem = f"{out} does not say what to write: end it with {', '.join(SUFFIXES)}"
        raise OpticNerveError(problem, kind="unsupported")
    if out.exists():
        raise OpticNerveError(f"{out} is there already; name another file, or remove it", kind="exists-already")
    out.parent.mkdir(parents=True, exist_ok=True)
    write = {".jsonl": _lines, ".parquet": _table, ".tar": _shard}[out.suffix]
    with atomic.replacing(out) as partial, partial.open("wb") as file:
        return write(conversations, out, file)


def record_of_conversation(conversation: Conversation, refer: Refer) -> dict[str, Any]:
    """A chat record (or, of preference data, one of TRL's form) that reads as the same conversation."""
    meta = conversation.meta
    if "turns" in meta:
        raise DataError(
            "questions that were brought together by picture have several answers to be measured by",
            where=conversation.where, remedy="convert without group_by_image", kind="conflict",
        )  # fmt: skip
    messages = [_message(m, refer, conversation.where) for m in conversation.messages]
    made: dict[str, Any] = {"id": conversation.id}
    if "rejected" in meta:
        worse = {"role": "assistant", "content": [{"type": "text", "text": meta["rejected"]}]}
        made |= {"prompt": messages[:-1], "chosen": messages[-1:], "rejected": [worse]}
    else:
        made["messages"] = messages
    if conversation.tools:
        made["tools"] = list(conversation.tools)
    return made | {k: meta[k] for k in ("answers", "choices", "type") if meta.get(k) is not None}


def _message(message: Message, refer: Refer, where: str) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    for video, group in groupby(message.parts, key=_video):
        if video is not None:
            frames, (source, of) = list(group), video
            if len(frames) % of:
                raise DataError(f"{len(frames)} frames of {of} of a video", where=where, kind="unreadable-video")
            parts += [{"type": "video", **refer("video", source)}] * (len(frames) // of)
            continue
        for part in group:
            if isinstance(part, TextPart):
                parts.append({"type": "text", "text": part.text})
                continue
            kind = "image" if isinstance(part, ImagePart) else "audio"
            if not isinstance(part.source, Path | bytes):
                raise DataError(f"an opened {kind} cannot be written", where=where, kind="unsupported")
            parts.append({"type": kind, **refer(kind, part.source)})
    flag = {} if message.learn else {"weight": 0}
    return {"role": message.role, "content": parts, **flag, **message.tool_fields()}


def _video(part: TextPart | ImagePart | AudioPart) -> tuple[Path | bytes, int] | None:
    frame = part.source if isinstance(part, ImagePart) else None
    return (frame.source, frame.of) if isinstance(frame, Frame) else None


# -- the three kinds of file ------------------------------------------------------------------------------------------


def _lines(conversations: Iterable[Conversation], out: Path, file: BinaryIO) -> int:
    folder = out.parent / f"{out.stem}_media"
    home, copied = out.parent.resolve(), set[Path]()

    def refer(kind: str, source: Path | bytes) -> dict[str, Any]:
        if isinstance(source, Path) and (found := source.resolve()).is_relative_to(home):
            return {kind: found.relative_to(home).as_posix()}
        if isinstance(source, Path) and source.is_dir():
            problem = f"{source} is a video in a folder, and lies outside of {out.parent}"
            remedy = f"write the file beside it, or move it below {out.parent}"
            raise DataError(problem, remedy=remedy, kind="outside-media")
        content = source.read_bytes() if isinstance(source, Path) else source
        ending = source.suffix if isinstance(source, Path) else f".{_ending(content, kind)}"
        copy = folder / f"{hashlib.sha256(content).hexdigest()[:24]}{ending}"
        if copy not in copied and not copy.exists():
            folder.mkdir(exist_ok=True)
            atomic.write(copy, content)
        copied.add(copy)
        return {kind: copy.relative_to(out.parent).as_posix()}

    count = 0
    for conversation in conversations:
        line = json.dumps(record_of_conversation(conversation, refer), ensure_ascii=False)
        file.write(line.encode() + b"\n")
        count += 1
    return count


def _held(conversation: Conversation) -> dict[str, Any]:
    """A record that holds its media as bytes, listed by kind; its parts keep their places."""
    media: dict[str, list[dict[str, Any]]] = {f"{kind}s": [] for kind in KINDS}

    def refer(kind: str, source: Path | bytes) -> dict[str, Any]:
        if isinstance(source, Path) and source.is_dir():
            problem = f"{source} is a video in a folder, and this file holds media as bytes"
            raise DataError(problem, where=conversation.where, remedy="convert to .jsonl", kind="unsupported")
        content = source.read_bytes() if isinstance(source, Path) else source
        name = source.name if isinstance(source, Path) else None
        media[f"{kind}s"].append({"bytes": content, "path": name})
        return {}

    return {**record_of_conversation(conversation, refer), **media}


def _row(conversation: Conversation) -> dict[str, Any]:
    """A record for a table, in which what tools say of themselves is a JSON text: no two have the same fields."""
    row = _held(conversation)
    if "tools" in row:
        row["tools"] = json.dumps(row["tools"], ensure_ascii=False)
    for turn in (t for name in ("messages", "prompt", "chosen") for t in row.get(name, ())):
        if "tool_calls" in turn:
            turn["tool_calls"] = json.dumps(turn["tool_calls"], ensure_ascii=False)
    return row


def _table(conversations: Iterable[Conversation], out: Path, file: BinaryIO) -> int:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    media = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    part = pa.struct([("type", pa.string()), ("text", pa.string())])
    words = [(name, pa.string()) for name in ("tool_calls", "tool_call_id", "name")]
    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(part)), ("weight", pa.int64()), *words]))
    texts = pa.list_(pa.string())
    kinds = dict.fromkeys(("messages", "prompt", "chosen", "rejected"), turns) | {"answers": texts, "choices": texts}
    kinds |= {
        "id": pa.string(),
        "type": pa.string(),
        "tools": pa.string(),
        **dict.fromkeys((f"{k}s" for k in KINDS), media),
    }
    count, rows, writer, names = 0, list[dict[str, Any]](), None, list[str]()
    for conversation in conversations:
        row = _row(conversation)
        preferred = "chosen" in row
        if writer is None:
            names = [n for n in kinds if n not in (("messages",) if preferred else ("prompt", "chosen", "rejected"))]
            writer = pq.ParquetWriter(file, pa.schema([(n, kinds[n]) for n in names]))
        if ("chosen" in names) != preferred:
            problem = "preference data and other data cannot stand in one table"
            raise DataError(problem, where=conversation.where, remedy="convert to .jsonl", kind="conflict")
        rows.append(row)
        count += 1
        if len(rows) >= _ROWS:
            writer.write_table(pa.Table.from_pylist(rows, schema=writer.schema))
            rows.clear()
    if writer is None:
        raise OpticNerveError(f"there is no sample to write into {out}", kind="empty")
    if rows:
        writer.write_table(pa.Table.from_pylist(rows, schema=writer.schema))
    writer.close()
    return count


def _shard(conversations: Iterable[Conversation], out: Path, file: BinaryIO) -> int:
    count = 0
    with tarfile.open(fileobj=file, mode="w") as tar:
        for count, conversation in enumerate(conversations, start=1):
            row = _held(conversation)
            if row.pop("videos"):
                problem = "a shard's videos are not read"
                raise DataError(problem, where=conversation.where, remedy="convert to .parquet", kind="unsupported")
            key = f"{count - 1:09d}"
            for kind in ("image", "audio"):
                for number, medium in enumerate(row.pop(f"{kind}s")):
                    ending = _ending(medium["bytes"], kind)
                    _add(tar, f"{key}.{kind}{number:04d}.{ending}", medium["bytes"])
            _add(tar, f"{key}.json", json.dumps(row, ensure_ascii=False).encode())
    return count


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _ending(content: bytes, kind: str) -> str:
    """What a file of these bytes is called. The bytes decide how it is opened, not the name."""
    if content[:4] == b"RIFF":
        return "webp" if content[8:12] == b"WEBP" else "wav"
    usual = {"image": "png", "audio": "wav", "video": "mp4"}[kind]
    return next((ending for begins, ending in _BEGINNINGS if content.startswith(begins)), usual)
