"""Folders of pictures alone: each with a text file of its own name, or in a folder that is called as what it shows.

`1.jpg` beside `1.txt` has the text as its caption (as img2dataset and many tools write them). Without texts,
`cat/1.jpg` is captioned `cat` (datasets' and torchvision's ImageFolder); folders that are a split's name
(`train/cat/1.jpg`) say no more than that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from opticnerve.data.sources.base import Location, Record, not_utf8, refused
from opticnerve.data.sources.paths import known_split
from opticnerve.types import DataError


class PictureFolders:
    """The pictures of a folder, each a record with `image` and `caption`.

    `written`: captions are what stands in the text files; else they are the folders' names.
    """

    def __init__(self, folder: Path, pictures: Sequence[Path]) -> None:
        self.folder, self.pictures = folder, list(pictures)
        self.written = any(p.with_suffix(".txt").is_file() for p in pictures)
        self.files = [p.with_suffix(".txt") for p in pictures] if self.written else self.pictures

    def __iter__(self) -> Iterator[Record | DataError]:
        for number in range(len(self.pictures)):
            try:
                yield self.at(Location(0, number, 1), number)
            except DataError as e:
                yield e

    def at(self, place: Location, index: int) -> Record:
        picture = self.pictures[place.start]
        name = picture.relative_to(self.folder)
        caption = self._text(picture) if self.written else self._class(name)
        fields = {"id": name.with_suffix("").as_posix(), "image": name.as_posix(), "caption": caption}
        return Record(fields, str(picture), index, place)

    def _text(self, picture: Path) -> str:
        """What stands in the text file beside a picture."""
        file = picture.with_suffix(".txt")
        try:
            return file.read_text("utf-8-sig").strip()
        except UnicodeDecodeError as e:
            raise not_utf8(str(file), e.start, e.object[e.start]) from e
        except OSError as e:
            raise DataError(
                f"{picture.name} has no text file of its name, and others have", where=str(picture),
                remedy="write it, or remove the picture", kind="missing-field",
            ) from e  # fmt: skip

    def _class(self, name: Path) -> str:
        """What the folder of a picture is called."""
        folder = name.parent.name
        if not folder or known_split(folder):
            problem = "the picture lies in no folder that is called as what it shows"
            raise refused(self.folder / name, problem, "put it into one, or write a metadata.csv", "missing-field")
        return folder
