"""Conversations of any layout written as chat records: JSON lines, Parquet, or webdataset shards.

What is learned, which answers are preferred and what an evaluation asks goes along, so that the new file gives the same
samples. JSON lines name media by paths from their own folder, and what lies elsewhere (or nowhere: bytes) is copied
into `<name>_media` beside them; Parquet and shards hold the bytes. Large data go into several, numbered files. All are
whole or not there.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from opticnerve.common import atomic
from opticnerve.data.media.files import KINDS
from opticnerve.types import AudioPart, Conversation, DataError, Frame, ImagePart, Message, OpticNerveError, TextPart

_ROWS = 256  # of a group of Parquet's
_PATTERN = re.compile(r"%0?\d*d")
SHARD_ROWS, SHARD_BYTES = 100_000, 3_000_000_000
"""Bounds of a shard where none are given, webdataset's own (`ShardWriter`)."""
_BEGINNINGS = (
    (b"\x89PNG", "png"), (b"\xff\xd8", "jpg"), (b"GIF8", "gif"), (b"BM", "bmp"), (b"II*\0", "tiff"), (b"MM\0*", "tiff"),
    (b"fLaC", "flac"), (b"OggS", "ogg"), (b"ID3", "mp3"), (b"\xff\xfb", "mp3"),
)  # fmt: skip

Refer = Callable[[str, Path | bytes], dict[str, Any]]
"""From kind and source of a medium to what its part says of it."""


def convert(
    conversations: Iterable[Conversation], out: Path, *, shard_rows: int | None = None, shard_bytes: int | None = None
) -> int:
    """Write conversations by the ending of `out`, and say how many there were.

    Args:
        out: a file, or several: `rows-%05d.parquet` is webdataset's way to number them (rows-00000.parquet, …).
        shard_rows, shard_bytes: with such a name, samples of a file, and bytes after which the next one begins.

    Raises:
        OpticNerveError: `out` is there already, or has another ending; bounds without a number in the name; there is
            no sample.
        DataError: a sample that cannot be written so. Then nothing is.
    """
    make, several = _WRITERS.get(out.suffix), _PATTERN.search(out.name) is not None
    if re.match(r"[a-z0-9]+:/", str(out)):
        problem = f"{out} is no place on this machine; write a file here, and copy it there"
        raise OpticNerveError(problem, kind="unsupported")
    if make is None:
        problem = f"{out} does not say what to write: end it with {', '.join(_WRITERS)}"
        raise OpticNerveError(problem, kind="unsupported")
    if not several and (shard_rows, shard_bytes) != (None, None):
        name = f"{out.stem}-%05d{out.suffix}"
        raise OpticNerveError(f"{out} is one file, and a bound wants several; name them {name}", kind="conflict")
    if there := next(out.parent.glob(_PATTERN.sub("*[0-9]", out.name) if several else glob.escape(out.name)), None):
        raise OpticNerveError(f"{there} is there already; name another file, or remove it", kind="exists-already")
    out.parent.mkdir(parents=True, exist_ok=True)
    rows, size = shard_rows or SHARD_ROWS, shard_bytes or SHARD_BYTES
    count, number, writer = 0, 0, None
    with ExitStack() as files:  # each is whole or not there, and so are all
        for conversation in conversations:
            if writer is None or (several and (writer.rows >= rows or writer.size >= size)):
                if writer is not None:
                    writer.close()
                place = out.with_name(out.name % number) if several else out
                partial = files.enter_context(atomic.replacing(place))
                writer = make(files.enter_context(partial.open("wb")), out, first=count)
                number += 1
            writer.add(conversation)
            writer.rows += 1
            count += 1
        if writer is None:
            raise OpticNerveError(f"there is no sample to write into {out}", kind="empty")
        writer.close()
    return count


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


# -- the three kinds of file ------------------------------------------------------------------------------------------


class _RecordWriter:
    """A file that takes conversations. `rows`: how many; `size`: bytes so far; `first`: how many came before it."""

    def __init__(self, file: BinaryIO, out: Path, *, first: int) -> None:
        self.file, self.out, self.first, self.rows = file, out, first, 0

    @property
    def size(self) -> int:
        return self.file.tell()

    def add(self, conversation: Conversation) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.file.close()


class _LineWriter(_RecordWriter):
    """Chat JSON lines, and a folder of those media that do not lie below the file's own."""

    def add(self, conversation: Conversation) -> None:
        line = json.dumps(record_of_conversation(conversation, self._refer), ensure_ascii=False)
        self.file.write(line.encode() + b"\n")

    def _refer(self, kind: str, source: Path | bytes) -> dict[str, Any]:
        home = self.out.parent.resolve()
        if isinstance(source, Path) and (found := source.resolve()).is_relative_to(home):
            return {kind: found.relative_to(home).as_posix()}
        if isinstance(source, Path) and source.is_dir():
            problem = f"{source} is a video in a folder, and lies outside of {self.out.parent}"
            remedy = f"write the file beside it, or move it below {self.out.parent}"
            raise DataError(problem, remedy=remedy, kind="outside-media")
        content = source.read_bytes() if isinstance(source, Path) else source
        ending = source.suffix if isinstance(source, Path) else f".{_ending(content, kind)}"
        stem = _PATTERN.sub("", self.out.stem).rstrip("-_.")
        copy = self.out.parent / f"{stem}_media" / f"{hashlib.sha256(content).hexdigest()[:24]}{ending}"
        if not copy.exists():
            copy.parent.mkdir(exist_ok=True)
            atomic.write(copy, content)
        return {kind: copy.relative_to(self.out.parent).as_posix()}


class _Table(_RecordWriter):
    """Parquet. What tools say of themselves is a JSON text in it, for no two have the same fields."""

    def __init__(self, file: BinaryIO, out: Path, *, first: int) -> None:
        super().__init__(file, out, first=first)
        self._waiting: list[dict[str, Any]] = []
        self._bytes = 0  # of these, about
        self._writer: Any = None
        self._preferred = False

    @property
    def size(self) -> int:
        return self.file.tell() + self._bytes

    def add(self, conversation: Conversation) -> None:
        row = _held(conversation)
        media = {name: row.pop(f"{name}s") for name in KINDS}
        for holder in (row, *(t for name in ("messages", "prompt", "chosen") for t in row.get(name, ()))):
            for key in {"tools", "tool_calls"} & holder.keys():
                holder[key] = json.dumps(holder[key], ensure_ascii=False)
        if self._writer is None:
            self._preferred = "chosen" in row
            self._writer = self._opened()
        if self._preferred != ("chosen" in row):
            problem = "preference data and other data cannot stand in one table"
            raise DataError(problem, where=conversation.where, remedy="convert to .jsonl", kind="conflict")
        self._bytes += len(json.dumps(row)) + sum(len(m["bytes"]) for listed in media.values() for m in listed)
        self._waiting.append(row | {f"{name}s": listed for name, listed in media.items()})
        if len(self._waiting) >= _ROWS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()
        super().close()

    def _opened(self) -> Any:
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]

        texts, text = pa.list_(pa.string()), pa.string()
        media = pa.list_(pa.struct([("bytes", pa.binary()), ("path", text)]))
        part = pa.struct([("type", text), ("text", text)])
        words = [(name, text) for name in ("tool_calls", "tool_call_id", "name")]
        turns = pa.list_(pa.struct([("role", text), ("content", pa.list_(part)), ("weight", pa.int64()), *words]))
        said = ("prompt", "chosen", "rejected") if self._preferred else ("messages",)
        columns = dict.fromkeys(said, turns) | {"answers": texts, "choices": texts, "id": text, "type": text}
        columns |= {"tools": text, **dict.fromkeys((f"{kind}s" for kind in KINDS), media)}
        return pq.ParquetWriter(self.file, pa.schema(list(columns.items())))

    def _flush(self) -> None:
        import pyarrow as pa

        if self._waiting:
            self._writer.write_table(pa.Table.from_pylist(self._waiting, schema=self._writer.schema))
            self._waiting.clear()
            self._bytes = 0


class _TarShard(_RecordWriter):
    """A webdataset shard."""

    def __init__(self, file: BinaryIO, out: Path, *, first: int) -> None:
        super().__init__(file, out, first=first)
        self._tar = tarfile.open(fileobj=file, mode="w")  # noqa: SIM115  (closed by `close`)

    def add(self, conversation: Conversation) -> None:
        row = _held(conversation)
        if row.pop("videos"):
            problem = "a shard's videos are not read"
            raise DataError(problem, where=conversation.where, remedy="convert to .parquet", kind="unsupported")
        key = f"{self.first + self.rows:09d}"
        for kind in ("image", "audio"):
            for number, medium in enumerate(row.pop(f"{kind}s")):
                ending = _ending(medium["bytes"], kind)
                _add(self._tar, f"{key}.{kind}{number:04d}.{ending}", medium["bytes"])
        _add(self._tar, f"{key}.json", json.dumps(row, ensure_ascii=False).encode())

    def close(self) -> None:
        self._tar.close()
        super().close()


_WRITERS: dict[str, type[_RecordWriter]] = {".jsonl": _LineWriter, ".parquet": _Table, ".tar": _TarShard}


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
