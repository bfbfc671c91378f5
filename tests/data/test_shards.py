"""webdataset shards: read in order, found again in any, and what is broken in them counted and named."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import refused
from opticnerve.data.dataset.load import load_data
from opticnerve.data.dataset.read import read
from opticnerve.data.media.open import open_image
from opticnerve.data.sources import paths, webdataset
from opticnerve.recipe import DataSpec
from opticnerve.types import Conversation, DataError

pytestmark = pytest.mark.usefixtures("private_cache")


def png(shade: int) -> bytes:
    made = io.BytesIO()
    PIL.Image.new("L", (3, 2), shade).save(made, "PNG")
    return made.getvalue()


def tar(path: Path, *members: tuple[str, bytes | str], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=form) as out:
        for name, content in members:
            about = tarfile.TarInfo(name)
            raw = content.encode() if isinstance(content, str) else content
            about.size = len(raw)
            out.addfile(about, io.BytesIO(raw))
    return path


def samples(first: int, count: int) -> list[tuple[str, bytes | str]]:
    return [m for n in range(first, first + count) for m in ((f"{n:04d}.png", png(n)), (f"{n:04d}.txt", f"no. {n}\n"))]


def loaded(path: Any, **options: Any) -> tuple[list[Conversation], list[DataError]]:
    errors: list[DataError] = []
    found = load_data(DataSpec(path=str(path), **options), on_error=errors.append)
    return list(found), errors


@pytest.fixture
def three(tmp_path: Path) -> Path:
    for n in range(3):
        tar(tmp_path / "s" / f"{n:03d}.tar", *samples(10 * n, 4))
    return tmp_path / "s"


@pytest.mark.parametrize("pattern", ["{000..002}.tar", "*.tar", "00[0-2].tar", "{000,001,002}.tar", ""])
def test_patterns(three: Path, pattern: str) -> None:
    found, errors = loaded(three / pattern if pattern else three, format="webdataset")
    assert [c.id for c in found] == [f"{10 * s + n:04d}" for s in range(3) for n in range(4)] and not errors
    assert found[5].answer == "no. 11" and found[5].where.endswith("001.tar[0011]")
    picture = open_image(found[5].images[0].source)
    assert picture.size == (3, 2) and picture.getpixel((0, 0)) == (11, 11, 11)


def test_any_order_and_processes(three: Path) -> None:
    found = load_data(DataSpec(path=str(three / "*.tar")))
    wanted = list(found)
    assert [found[n] for n in (11, 0, 5, 5)] == [wanted[n] for n in (11, 0, 5, 5)]
    assert list(pickle.loads(pickle.dumps(found))) == wanted == list(read(three / "*.tar"))


def test_fields_from_json_with_the_pictures_of_the_shard(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image><image>Which?"}, {"from": "gpt", "value": "Both."}]
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "This."},
    ]
    asked = {"id": "mine", "question": "what?", "answer": "red", "image": "elsewhere.jpg"}
    llava = tar(tmp_path / "l.tar", ("a/1.json", json.dumps({"conversations": turns})), ("a/1.0.png", png(1)),
                ("a/1.1.png", png(2)), ("a/1.pyd", b"never unpickled"))  # fmt: skip
    (two,) = loaded(llava)[0]
    assert two.id == "a/1" and [i.source for i in two.images] == [png(1), png(2)]
    (one,) = loaded(tar(tmp_path / "c.tar", ("1.json", json.dumps({"messages": chat})), ("1.png", png(3))))[0]
    assert one.images[0].source == png(3) and one.answer == "This."
    (vqa,) = loaded(tar(tmp_path / "v.tar", ("1.json", json.dumps(asked)), ("1.png", png(3))))[0]
    assert vqa.id == "mine" and vqa.images[0].source == png(3)
    (sound,) = loaded(tar(tmp_path / "a.tar", ("1.wav", b"RIFF"), ("1.txt", "a word")))[0]
    assert sound.audios[0].source == b"RIFF"


def test_a_missing_shard_is_one_bad_sample(three: Path) -> None:
    found, errors = loaded(three / "{000..003}.tar")
    assert len(found) == 12 and [(e.kind, e.where[-7:]) for e in errors] == [("shard", "003.tar")]
    with refused("shard", "003.tar", error=DataError):
        load_data(DataSpec(path=str(three / "{000..003}.tar")))
    with refused("missing-file", "x*.tar", error=DataError):
        load_data(DataSpec(path=str(three / "x*.tar")))


def test_what_is_bad_in_a_shard_is_named(tmp_path: Path) -> None:
    path = tar(tmp_path / "s.tar", *samples(0, 1), ("1.json", "{"), ("1.png", png(1)), ("2.png", png(2)), ("3.txt", "x"),
               ("4.txt", b"\xff"), *samples(5, 1), ("6.json", "[]"))  # fmt: skip
    found, errors = loaded(path)
    assert [c.id for c in found] == ["0000", "0005"]
    kinds = [(e.kind, e.where[-3:]) for e in errors]
    assert kinds == [("json", "[1]"), ("missing-field", "[2]"), ("missing-field", "[3]"), ("encoding", "[4]"),
                     ("json", "[6]")]  # fmt: skip


def test_a_sample_of_too_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "MAX_SAMPLE", 4_000)
    found, errors = loaded(tar(tmp_path / "s.tar", *samples(0, 1), ("1.png", bytes(5_000)), *samples(2, 1)))
    assert len(found) == 2 and "are read" in str(errors[0])


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(1, 11_000), zipped=st.booleans(), form=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
def test_a_shard_that_is_cut_off(cut: int, zipped: bool, form: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is whole in it is read; the cut is one bad sample that names the shard; nothing is read in part."""
    folder = tmp_path_factory.mktemp("cut")
    members = [(f"{'long/' * 30}{name}" if name.startswith("0001") else name, c) for name, c in samples(0, 4)]
    whole = tar(folder / "whole.tar", *members, form=form).read_bytes()
    wanted, _ = loaded(folder / "whole.tar")
    packed = gzip.compress(whole, 1) if zipped else whole
    path = folder / ("whole.tar.gz" if zipped else "cut.tar")
    cut = min(cut, len(packed) - 1) if not zipped else cut % len(packed)
    path.write_bytes(packed[:cut])
    if cut >= (end := len(whole.rstrip(b"\0")) // 512 * 512 + 1024) and not zipped:
        assert len(loaded(path)[0]) == 4 and end  # only the padding behind the tar's end is gone
        return
    try:
        found, errors = loaded(path)
    except DataError as e:  # nothing in it tells the format
        assert "cannot tell the format" in str(e)
        return
    assert len(found) < 5 and [c.id for c in found] == [c.id for c in wanted][: len(found)]
    assert [c.answer for c in found] == [c.answer for c in wanted][: len(found)]
    assert [(e.kind, e.where) for e in errors] == [("shard", str(path))]


def test_gzipped_shards_are_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.tar.gz"
    path.write_bytes(gzip.compress(tar(tmp_path / "s.tar", *samples(0, 3)).read_bytes()))
    assert len(loaded(path)[0]) == 3
    monkeypatch.setattr(webdataset.gzip, "open", None)
    assert len(loaded(path)[0]) == 3


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 4_000), byte=st.integers(0, 255))
def test_a_damaged_byte_breaks_nothing_else(at: int, byte: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tar(tmp_path_factory.mktemp("byte") / "s.tar", *samples(0, 4))
    raw = bytearray(path.read_bytes())
    raw[at % len(raw)] = byte
    path.write_bytes(raw)
    try:
        found, errors = loaded(path)
    except DataError:
        return
    assert len(found) + len(errors) >= 1


def test_braces() -> None:
    assert paths.braces("a{8..10}b{x,y}") == [f"a{n}b{c}" for n in (8, 9, 10) for c in "xy"]
    assert paths.braces("{008..010}") == ["008", "009", "010"] and paths.braces("plain") == ["plain"]
