"""Tables of text: cells between commas, semicolons, tabs or bars; a quoted one may span lines.

The first line is a header, unless a picture, a sound or a web address stands in it: then two columns are the medium and
its caption (Flickr8k's token file, CC3M), and more are called column_1, column_2, … A quote that is opened and not
closed, or closed by another cell's, costs its own row: reading goes on at the next line; with the repair
`close-quotes` the quotes of such a line are taken as they stand.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opticnerve.data.formats.names import kind_by_name, kind_by_value
from opticnerve.data.media.files import is_url
from opticnerve.data.sources.base import Handles, Location, Record, changed, not_utf8
from opticnerve.types import DataError

_DELIMITERS = ",;\t|"
_MISSING = ("", "NaN", "nan")  # as pandas writes missing numbers
_LONGEST, _SPANNED = 1 << 30, 1 << 17
"""Characters of a cell (a picture as base64), and of all lines that one row spans, those of base64 left out: each row
with an open quote reads so far."""
_OF_BASE64 = re.compile(r"[A-Za-z0-9+/=_-]+\s*")
CLOSE_QUOTES = "close-quotes"


class Csv:
    """A table, whose delimiter is the one that stands most often in its first line."""

    def __init__(self, path: Path, *, close_quotes: bool = False) -> None:
        self.path, self.files, self.close_quotes = path, [path], close_quotes
        self._handles = Handles(self.files)
        self._header: list[str] = []
        self._delimiter = ""

    def __iter__(self) -> Iterator[Record | DataError]:
        with self.path.open("rb") as file:
            lines = _Lines(file)
            self._delimiter = _delimiter(lines.peek(), self.path.suffix.lower())
            header: list[str] = []
            for line, start, found, mended in self._rows(lines, header):
                where = f"{self.path}:{line}"
                checked = self._checked(found, where, header) if isinstance(found, list) else found
                if checked is None:
                    continue
                if not header:
                    if isinstance(checked, DataError):
                        raise checked
                    assert isinstance(found, list)
                    names = _without_header(found)
                    header += names or self._named(found, where)
                    self._header = header
                    if not names:
                        continue
                    checked = self._checked(found, where, header)
                if isinstance(checked, DataError):
                    yield checked
                elif checked is not None:
                    yield Record(checked, where, line, Location(0, start, lines.read - start), mended)

    def at(self, place: Location, index: int) -> Record:
        if not self._header:
            next(iter(self), None)  # reads the header
        text = self._handles.read(*place).decode("utf-8")
        where = f"{self.path}:{index}"
        mended: tuple[str, ...] = ()
        try:
            row: list[str] = next(self._reader(io.StringIO(text, newline="")), [])
        except csv.Error as e:
            if not self.close_quotes:
                raise changed(self.path) from e
            row, mended = self._unquoted(text), (CLOSE_QUOTES,)
        checked = self._checked(row, where, self._header)
        if isinstance(checked, DataError):
            raise checked
        if checked is None:
            raise changed(self.path)
        return Record(checked, where, index, place, mended)

    def _unquoted(self, line: str) -> list[str]:
        """The cells of one line in which quotes mean nothing."""
        cells = next(csv.reader([line], delimiter=self._delimiter, quoting=csv.QUOTE_NONE), [])
        return [c.strip('"') if c.startswith('"') else c for c in cells]

    def _reader(self, lines: Iterator[str]) -> Any:
        csv.field_size_limit(_LONGEST)  # of the process: a worker that reads a single row sets it, too
        return csv.reader(lines, delimiter=self._delimiter, skipinitialspace=self._delimiter == "|", strict=True)

    def _rows(
        self, lines: _Lines, header: list[str]
    ) -> Iterator[tuple[int, int, list[str] | DataError, tuple[str, ...]]]:
        """(line, first byte, row or what is wrong with it, its repairs); `header` is filled by the caller."""
        reader = self._reader(lines)
        while True:
            line, start = lines.number + 1, lines.read
            lines.taken.clear()
            lines.spanned = 0
            row: list[str] = []
            problem = ""
            try:
                row = next(reader)
                if self._swallows(lines.taken, row, header):
                    problem = "its quoted cell holds whole rows"
            except StopIteration:
                return
            except csv.Error as e:
                problem = str(e)
            if problem:
                lines.give_back()
                reader = self._reader(lines)
                if self.close_quotes and header and len(row := self._unquoted(lines.taken[0])) == len(header):
                    yield line, start, row, (CLOSE_QUOTES,)
                    continue
                bad = DataError(
                    f"not a CSV row: {problem}", where=f"{self.path}:{line}",
                    kind="csv", remedy="close the quotes; a quote within a quoted cell is written twice; or repair: "
                    f"[{CLOSE_QUOTES}], which takes the quotes of such a line as they stand",
                )  # fmt: skip
            yield line, start, bad if problem else row, ()

    def _swallows(self, taken: list[str], row: list[str], header: list[str]) -> bool:
        """Whether a cell that spans lines spans rows: lines of it are rows, media and all, or every one might be."""
        if len(taken) < 2 or not header:
            return False
        inner = [next(csv.reader([line], delimiter=self._delimiter), []) for line in taken[1:]]
        if len(row) == len(header):
            media = [n for n, name in enumerate(header) if kind_by_name(name)]
            telling = [n for n in media if kind_by_value(row[n].strip())]
            if telling:
                return any(len(i) == len(header) and kind_by_value(i[n].strip()) for i in inner for n in telling)
        return len(header) > 1 and all(len(i) == len(header) for i in inner)

    @staticmethod
    def _named(row: list[str], where: str) -> list[str]:
        names = [name.strip() for name in row]
        if twice := [n for n, count in Counter(names).items() if count > 1 and n]:
            problem = f"two columns are called {twice[0]}"
            raise DataError(problem, where=where, remedy="give each a name of its own", kind="csv")
        return names

    def _checked(self, row: list[str], where: str, header: list[str]) -> dict[str, Any] | DataError | None:
        """The row's fields, what is wrong with it, or None if it is empty."""
        if not any(row):
            return None
        bad = next((c for cell in row if not cell.isascii() for c in cell if "\udc80" <= c <= "\udcff"), None)
        if bad is not None:
            return not_utf8(where, None, ord(bad) - 0xDC00)
        if not header:
            return {}
        if len(row) != len(header):
            problem = f"{len(row)} cells under {len(header)} column names ({', '.join(header)})"
            remedy = "put cells that hold the delimiter or line breaks in double quotes"
            return DataError(problem, where=where, remedy=remedy, kind="csv")
        cells = [cell.strip() for cell in row] if self._delimiter == "|" else row
        if header == ["image", "caption"]:
            cells = [_unnumbered(cells[0]), cells[1]]
        return {k: None if v in _MISSING else v for k, v in zip(header, cells, strict=True)}


def _without_header(row: list[str]) -> list[str]:
    """Names for the columns of a table whose first row is one of data; else none."""
    kinds = [kind_by_value(_unnumbered(cell)) or ("image" if is_url(cell) else None) for cell in row]
    if not any(kinds):
        return []
    if len(row) == 2 and None in kinds:
        return [kind or "caption" for kind in kinds]
    return [f"column_{n}" for n in range(1, len(row) + 1)]


def _unnumbered(cell: str) -> str:
    """`1.jpg#0` → `1.jpg`: Flickr's caption number 0 of the picture."""
    return re.sub(r"(?<=\.\w{3})#\d+$", "", cell.strip())


def _delimiter(header: str, suffix: str) -> str:
    if suffix in (".tsv", ".token", ".txt") and "\t" in header:
        return "\t"  # captions without a header may hold more commas
    usual = "\t" if suffix == ".tsv" else ","
    bare = "".join(header.split('"')[::2])  # what is not in quotes
    return max(usual + _DELIMITERS, key=bare.count)


class _Lines(Iterator[str]):
    """The lines of a file as text. `read`: bytes that have been taken of it; `number`: lines; `taken`: the last ones.

    Bytes that are not UTF-8 pass as lone surrogates, so that only the row they stand in is lost.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        self.read = 3 if file.peek(3).startswith(b"\xef\xbb\xbf") else 0  # a byte order mark
        self.number = 0
        self.taken: list[str] = []
        self.spanned = 0  # characters of these but the first
        self._ahead: deque[str] = deque()
        self._text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")

    def __next__(self) -> str:
        if self.spanned > _SPANNED:
            raise csv.Error(f"its quoted cell spans more than {len(self.taken):,} lines")
        line = self._ahead.popleft() if self._ahead else next(self._text)
        if self.taken and not _OF_BASE64.fullmatch(line):
            self.spanned += len(line)
        self.read += _bytes(line)
        self.number += 1
        self.taken.append(line)
        return line

    def peek(self) -> str:
        """The first line that is not blank, or ''."""
        while not any(line.strip() for line in self._ahead):
            line = next(self._text, "")
            self._ahead.append(line)
            if not line:
                self._ahead.pop()
                return ""
        return self._ahead[-1]

    def give_back(self) -> None:
        """All of the lines that were taken but the first."""
        again = self.taken[1:]
        self._ahead.extendleft(reversed(again))
        self.number -= len(again)
        self.read -= sum(map(_bytes, again))


def _bytes(line: str) -> int:
    return len(line) if line.isascii() else len(line.encode("utf-8", "surrogateescape"))
