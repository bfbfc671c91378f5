"""webdataset shards as records: tar files whose members belong together where their names agree up to the first dot.

`shards/{000..099}.tar`, `shards/*.tar`, one file, or a folder of them; `.tar.gz` is unpacked once into the cache
folder. Of a sample's members, `json` gives the record's fields, `txt` the caption (unless the fields name one);
pictures and sounds come as bytes, one as `image` (or `audio`), several, in the order of their names, as a list. Other
members are passed over, pickled ones too. Samples are found again by where they begin, so that any order and an exact
resume need nothing else. The format is webdataset's (github.com/webdataset/webdataset); the standard library reads it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from opticnerve.common import atomic
from opticnerve.common.cache import cache_dir, new_folder
from opticnerve.data.formats.fields import empty
from opticnerve.data.sources.base import Handles, Location, Record, no_key_twice, not_utf8, refused
from opticnerve.data.sources.paths import matching, one_split
from opticnerve.types import DataError

PICTURES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"}
SOUNDS = {"flac", "wav", "mp3", "ogg", "opus", "m4a"}
_SAID = ("caption", "captions", "text", "texts", "conversations", "messages", "question", "prompt")
MAX_SAMPLE = 256 << 20
"""Bytes of one sample, all of its members together."""
_BLOCK = 512
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE)
_MOST_UNPACKED, _MOST_TIMES = 1 << 30, 100  # a shard that grows beyond both is no data set but a bomb
_BROKEN = (tarfile.TarError, ValueError, OverflowError)


def is_shards(path: Path) -> bool:
    """Whether a path names shards by itself: a .tar file, or a pattern of them."""
    return path.name.endswith((".tar", ".tar.gz", ".tgz"))


class Shards:
    """The samples of some shards, one shard after the other."""

    def __init__(self, path: Path, split: str | None = None) -> None:
        self.path = path
        self.files = _expanded(path, split)
        self._handles = Handles(_Unpacked(self.files))

    def __iter__(self) -> Iterator[Record | DataError]:
        """The samples in their order. A shard that is missing or cut off is one `DataError` of the kind `shard`; what
        was whole in it comes before."""
        index = 0
        for number in range(len(self.files)):
            found, seen = self._samples(number), set[str]()
            while True:
                try:
                    key, start, size = next(found, (None, 0, 0))
                except DataError as e:
                    yield e
                    break
                if key is None:
                    break
                try:
                    if key in seen:
                        problem, remedy = (
                            "an earlier sample of the shard has this name",
                            "give each sample a name of its own",
                        )
                        raise refused(f"{self.files[number]}[{key}]", problem, remedy, "shard")
                    seen.add(key)
                    yield self._record(number, key, index, Location(number, start, size))
                except DataError as e:
                    yield e
                index += 1

    def at(self, place: Location, index: int) -> Record:
        raw = self._handles.read(*place)
        try:
            with tarfile.open(fileobj=io.BytesIO(raw + bytes(2 * _BLOCK)), mode="r:") as tar:
                members = [(m.name, raw[m.offset_data : m.offset_data + m.size]) for m in tar if m.type in _FILES]
        except _BROKEN as e:
            raise refused(self.files[place.file], f"not a tar file any more: {e}", "", "shard") from e
        key = _key(members[0][0]) if members else ""
        return self._made(members, key, index, place)

    def _record(self, number: int, key: str, index: int, place: Location) -> Record:
        if place.size > MAX_SAMPLE:
            problem = f"the sample has {place.size:,} bytes, {MAX_SAMPLE:,} are read"
            raise refused(f"{self.files[number]}[{key}]", problem, "", "shard")
        return self.at(place, index)

    def _samples(self, number: int) -> Iterator[tuple[str, int, int]]:
        """(key, first byte, bytes) of each sample of a shard."""
        shard = self.files[number]
        try:
            unpacked, cut = unpack(shard)
            length = unpacked.stat().st_size
            with tarfile.open(unpacked, "r:") as tar:
                key, start, end = None, 0, 0
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # or the list of all of them would be kept
                    end_of_member = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                    if end_of_member > length:
                        raise _cut(shard, cut or f"it ends after {length:,} bytes, in the midst of {member.name}")
                    if member.type not in _FILES:
                        continue
                    if (own := _key(member.name)) != key:
                        if key is not None:
                            yield key, start, end - start
                        key, start = own, member.offset
                    end = end_of_member
                # The library takes whatever is no header for the end; the end is a block of zeros.
                if _block(unpacked, tar.offset) != bytes(_BLOCK):
                    raise _cut(shard, cut or f"after {tar.offset:,} bytes there is neither a member nor the tar's end")
                if key is not None:
                    yield key, start, end - start
        except DataError:
            raise
        except OSError as e:
            raise refused(shard, f"the shard cannot be read: {e.strerror or e}", "", "shard") from e
        except _BROKEN as e:
            raise _cut(shard, str(e) or type(e).__name__) from e

    def _made(self, members: list[tuple[str, bytes]], key: str, index: int, place: Location) -> Record:
        where = f"{self.files[place.file]}[{key}]"
        if twice := [n for n, count in Counter(name for name, _ in members).items() if count > 1]:
            problem, remedy = f"{twice[0]} stands in it twice", "give each member a name of its own"
            raise refused(where, problem, remedy, "shard")
        fields: dict[str, Any] = {}
        text = None
        for name, content in sorted(members):
            if ending(name) == "json":
                fields = _object(content, where)
            elif ending(name) == "txt":
                text = _text(content, where)
        media = ((name, {"bytes": content, "path": name}) for name, content in members)
        return Record(sample_of(fields, media, text, key), where, index, place)


def sample_of(fields: dict[str, Any], members: Iterable[tuple[str, Any]], text: str | None, key: str) -> dict[str, Any]:
    """The fields of a sample, its members that are pictures or sounds among them, and what its `txt` says."""
    listed = sorted(((n, m) for n, m in members if m is not None), key=lambda member: member[0])
    for kind, endings in (("image", PICTURES), ("audio", SOUNDS)):
        if found := [member for name, member in listed if ending(name) in endings]:
            fields.pop(f"{kind}s", None)
            fields[kind] = found[0] if len(found) == 1 else found
    if text is not None and all(empty(fields.get(name)) for name in _SAID):
        fields["caption"] = text
    fields.setdefault("id", key)
    return fields


def ending(name: str) -> str:
    return name.rpartition(".")[2].lower()


def unpack(shard: Path) -> tuple[Path, str]:
    """A plain tar file of the shard's content, and why it is not all of it ('' if it is). Unpacked once."""
    if shard.suffix.lower() not in (".gz", ".tgz"):
        return shard, ""
    stat = shard.stat()
    key = f"{shard.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    target = cache_dir() / "shards" / hashlib.sha256(key.encode()).hexdigest()[:24]
    if not target.is_dir():
        with new_folder(target) as made, (made / "shard.tar").open("wb") as out:
            cut = ""
            try:
                with gzip.open(shard) as packed:
                    while block := packed.read(1 << 20):
                        out.write(block)
                        if out.tell() > max(_MOST_UNPACKED, _MOST_TIMES * stat.st_size):
                            raise _cut(shard, f"it unpacks to more than {_MOST_TIMES} times its size")
            except (EOFError, zlib.error, gzip.BadGzipFile) as e:
                cut = f"it cannot be unpacked to its end: {str(e) or type(e).__name__}"
            atomic.write(made / "cut", cut)
    return target / "shard.tar", (target / "cut").read_text()


class _Unpacked(list[Path]):
    """Shards as files that can be read from any byte on, unpacked when they are asked for."""

    def __getitem__(self, number: Any) -> Any:
        return unpack(super().__getitem__(number))[0]


def _block(file: Path, start: int) -> bytes:
    with file.open("rb") as opened:
        opened.seek(start)
        return opened.read(_BLOCK)


def _expanded(path: Path, split: str | None) -> list[Path]:
    if path.is_dir():
        files = one_split(path, sorted(p for p in path.rglob("*") if is_shards(p)), split)
    else:
        files = matching(str(path), split)
    if not files:
        raise refused(path, "no shard fits this pattern", "check it, or write {000..099}", "missing-file")
    return files


def _key(name: str) -> str:
    """`folder/0001.seg.png` → `folder/0001`."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _object(content: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(content, object_pairs_hook=no_key_twice)
    except (ValueError, RecursionError) as e:
        raise DataError(f"its json is not valid: {e}", where=where, kind="json") from e
    if not isinstance(found, dict):
        raise DataError(f"its json is no object {{…}} but {type(found).__name__}", where=where, kind="json")
    return found


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode().strip()
    except UnicodeDecodeError as e:
        raise not_utf8(where, None, content[e.start]) from e


def _cut(shard: Path, problem: str) -> DataError:
    return refused(shard, f"the shard is damaged or cut off: {problem}", "get it again", "shard")
