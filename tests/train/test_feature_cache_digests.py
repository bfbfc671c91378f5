"""Files are hashed once, and again when they change."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

import tiny
from errors import refused
from opticnerve.data.media.open import image_digest
from opticnerve.features import digests
from opticnerve.features.digests import Digests
from opticnerve.types import DataError, Frame


@pytest.fixture
def files(tmp_path: Path) -> list[tuple[Any, str]]:
    for i in range(3):
        tiny.picture(i).save(tmp_path / f"{i}.png")
    return [(tmp_path / f"{i}.png", f"sample {i}") for i in range(3)]


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is hashed."""
    found: list[Any] = []

    def count(source: Any, *, where: str = "") -> str:
        found.append(source)
        return image_digest(source, where=where)

    monkeypatch.setattr(digests, "image_digest", count)
    return found


def test_a_second_run_reads_no_file(tmp_path: Path, files: list[tuple[Any, str]], hashed: list[Any]) -> None:
    first = Digests(tmp_path / "d.sqlite").of([*files, files[0]])
    assert len(hashed) == 3
    assert first == [image_digest(s) for s, _ in [*files, files[0]]]
    again = Digests(tmp_path / "d.sqlite")
    assert again.of([*files, files[0]]) == first
    assert again(*files[1]) == first[1]
    assert len(hashed) == 3


@pytest.mark.parametrize("what", ["size", "time"])
def test_a_changed_file_is_hashed_again(
    what: str, tmp_path: Path, files: list[tuple[Any, str]], hashed: list[Any]
) -> None:
    path = files[1][0]
    [before] = Digests(tmp_path / "d.sqlite").of([files[1]])
    stat = path.stat()
    if what == "size":
        path.write_bytes(path.read_bytes() + b"x")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"y")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    [after] = Digests(tmp_path / "d.sqlite").of([files[1]])
    assert after == image_digest(path) != before


def test_what_is_no_file(tmp_path: Path, files: list[tuple[Any, str]], hashed: list[Any]) -> None:
    opened, raw, missing = tiny.picture(5), files[0][0].read_bytes(), tmp_path / "none.png"
    given = [(opened, "a"), (raw, "b"), (missing, "c"), (Frame(files[0][0], 0, 2), "d"), files[0]]
    one, two, gone, frame, file = Digests(tmp_path / "d.sqlite").of(given)
    assert one == image_digest(opened)
    assert two == file == image_digest(raw)
    assert isinstance(gone, DataError)
    assert gone.where == "c"
    assert frame not in (one, two)
    assert Digests(tmp_path / "d.sqlite").of([given[3]]) == [frame]
    assert [s for s in hashed if isinstance(s, Frame)] == [given[3][0]]


def test_without_a_file_and_in_a_worker(files: list[tuple[Any, str]], hashed: list[Any]) -> None:
    known = Digests()
    found = known.of(files)
    there = pickle.loads(pickle.dumps(known))
    assert [there(*f) for f in files] == found
    assert len(hashed) == 3


def test_a_damaged_memory_is_said(tmp_path: Path, files: list[tuple[Any, str]]) -> None:
    (tmp_path / "d.sqlite").write_bytes(b"no database, and long enough to be read as one" * 30)
    with refused("damaged", tmp_path / "d.sqlite"):
        Digests(tmp_path / "d.sqlite").of(files)
