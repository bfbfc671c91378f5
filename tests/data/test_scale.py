"""Samples are read when they are visited: the same as in one pass, at a few bytes each, found again at the next start."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import refused
from opticnerve.data.dataset import index
from opticnerve.data.dataset.load import by_picture, held_out, load_data, load_examples, stream_data
from opticnerve.data.dataset.read import read
from opticnerve.data.sources import json_text
from opticnerve.data.sources.open import open_records
from opticnerve.recipe import DataSpec
from opticnerve.types import Conversation, DataError, OpticNerveError

pytestmark = pytest.mark.usefixtures("private_cache")

NAMES = [f"{n}.png" for n in range(6)]


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    for name in NAMES:
        PIL.Image.new("RGB", (2, 2)).save(folder / name)
    for place in (folder, folder.parent):
        os.utime(place, ns=(10**18, 10**18))  # long unchanged, so that an index may rely on it
    return folder


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files, too, have their index kept on disk."""
    monkeypatch.setattr(index, "KEPT", 0)


words = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=8)
captions = st.fixed_dictionaries(
    {"image": st.sampled_from([*NAMES, "missing.png"]), "caption": st.one_of(words, st.lists(words, max_size=3))},
    optional={"id": words},
)
questions = st.fixed_dictionaries(
    {"image": st.sampled_from([*NAMES, "missing.png"]), "question": words.map("q".__add__), "answer": words}
)
llava = st.fixed_dictionaries(
    {"conversations": st.lists(st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]), "value": words}))}
)
bad = st.sampled_from([1, "text", None, [], {"other": 1}])


def written(folder: Path, form: str, rows: list[Any], noise: random.Random) -> Path:
    """The rows as a file, with whatever white space its format allows between them."""

    def space() -> str:
        return noise.choice(["", " ", "\n", "\r\n \t"])

    if form == "json":
        body = ",".join(space() + json.dumps(r, ensure_ascii=noise.random() < 0.5) + space() for r in rows)
        content = noise.choice(["", "\ufeff"]) + space() + f"[{body}]" + space()
    elif form == "jsonl":
        lines = (noise.choice(["", "\n", "{\n"]) + json.dumps(r, ensure_ascii=noise.random() < 0.5) for r in rows)
        content = noise.choice(["", "\ufeff"]) + "\n".join(lines)
    else:
        made = io.StringIO(newline="")
        table = csv.writer(made, delimiter="\t" if form == "tsv" else ",", lineterminator=noise.choice(["\n", "\r\n"]))
        names = list(dict.fromkeys(k for r in rows if isinstance(r, dict) for k in r)) or ["image", "caption"]
        table.writerow(names)
        for row in rows:
            table.writerow([row.get(n, "") for n in names] if isinstance(row, dict) else ["too", "many", "cells", "x"])
        content = made.getvalue()
    path = folder / f"d.{form}"
    path.write_bytes(content.encode())
    return path


def outcome(read_all: Any) -> tuple[list[Conversation], list[str], str]:
    """Samples, bad samples, and what was raised."""
    errors: list[str] = []
    try:
        return list(read_all(lambda e: errors.append(f"{e.kind} {e}"))), errors, ""
    except OpticNerveError as e:
        return [], errors, str(e)


def plain(spec: DataSpec, on_error: Any = None) -> list[Conversation]:
    """What was loaded before there was an index: all conversations, as a list."""
    found = read(
        spec.path, format=spec.format, media=spec.media, limit=spec.limit, group_by_image=spec.group_by_image,
        on_error=on_error,
    )  # fmt: skip
    return [c for c in found if spec.split == "all" or held_out(c) == (spec.split == "held_out")]


class TestIndexedIsPlain:
    @settings(max_examples=60, deadline=None)
    @given(
        rows=st.one_of(*(st.lists(st.one_of(r, r, r, bad), max_size=12) for r in (captions, questions, llava))),
        form=st.sampled_from(["json", "jsonl", "csv", "tsv"]),
        limit=st.sampled_from([None, 1, 3]),
        split=st.sampled_from(["all", "train", "held_out"]),
        group=st.booleans(),
        seed=st.integers(0, 99),
    )
    def test_for_random_files(
        self, media: Path, rows: list[Any], form: str, limit: int | None, split: Any, group: bool, seed: int
    ) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = written(Path(folder), form, rows, random.Random(seed))
            spec = DataSpec(path=str(path), media=str(media), limit=limit, split=split, group_by_image=group)
            wanted = outcome(lambda e: plain(spec, e))
            assert outcome(lambda e: load_data(spec, on_error=e)) == wanted
            assert outcome(lambda e: stream_data(spec, on_error=e)) == wanted
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(index, "KEPT", 0)
                for _ in range(2):  # made, and found
                    assert outcome(lambda e: load_data(spec, on_error=e)) == wanted
            if not wanted[2]:
                grouped = [(g, 2) for g in by_picture(wanted[0])] * 2
                examples = outcome(lambda e: load_examples([spec.model_copy(update=SHARED)], on_error=e))
                assert [(list(c), n) for c, n in examples[0]] == grouped  # type: ignore[misc]

    @pytest.mark.parametrize("form", ["folder", "parquet", "shards"])
    def test_for_tables(self, media: Path, tmp_path: Path, form: str, kept: None, monkeypatch: Any) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq
        from datasets import Dataset

        rows = [{"image": {"path": NAMES[n % 6], "bytes": None}, "caption": f"no. {n}"} for n in range(200)]
        rows[7]["caption"] = None
        path = tmp_path / "d"
        if form == "folder":
            Dataset.from_list(rows).save_to_disk(str(path))
        else:
            monkeypatch.setattr("opticnerve.data.sources.tables._SMALL", 0 if form == "shards" else 1 << 20)
            path.mkdir()
            for part in range(2):
                pq.write_table(pa.Table.from_pylist(rows[part::2]), path / f"{part}.parquet", row_group_size=30)
        spec = DataSpec(path=str(path), media=str(media), format="hf")
        errors: list[str] = []
        wanted = plain(spec, lambda e: errors.append(str(e)))
        assert (len(wanted), len(errors)) == (199, 1)
        for _ in range(2):
            found = load_data(spec, on_error=lambda e: None)
            assert list(found) == wanted
            assert pickle.loads(pickle.dumps(found))[-1] == wanted[-1]

    def test_slices_and_negative_numbers(self, media: Path, tmp_path: Path) -> None:
        found = load_data(some(tmp_path, media, 10))
        wanted = list(found)
        assert list(found[2:9:3]) == wanted[2:9:3] and found[-1] == wanted[-1] and found[3:][::-1][0] == wanted[9]
        with pytest.raises(IndexError):
            found[10]


SHARED = {"share_prefix": True, "per_image": 2, "repeat": 2}


def some(folder: Path, media: Path, count: int, name: str = "some.jsonl") -> DataSpec:
    path = folder / name
    path.write_text("".join(json.dumps({"image": NAMES[n % 6], "caption": f"no. {n}"}) + "\n" for n in range(count)))
    return DataSpec(path=str(path), media=str(media))


class TestJsonList:
    @settings(max_examples=100, deadline=None)
    @given(
        text=st.recursive(
            st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
            lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner)),
        ).map(lambda v: json.dumps(v if isinstance(v, list) else [v])),
        chunk=st.integers(1, 9),
        cut=st.one_of(st.none(), st.integers(0, 30)),
        put=st.sampled_from(["", ",", "]", "x", '"', "\n", "é"]),
    )
    def test_a_piece_at_a_time_is_the_whole(self, text: str, chunk: int, cut: int | None, put: str) -> None:
        """Wherever the pieces end, and whatever is wrong with it: the items and the error of `json.loads`."""
        if cut is not None:
            text = text[:cut] + put + (text[cut + 1 :] if put else "")
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            path = Path(folder, "d.json")
            path.write_text(text)
            patch.setattr(json_text, "CHUNK", chunk)
            try:
                entries = json.loads(text)
            except json.JSONDecodeError as e:
                if text.strip():
                    with pytest.raises(DataError) as caught:
                        list(open_records(path))
                    told = {f"{path}:{e.lineno}:{e.colno}: not valid JSON: {e.msg}"}
                    if e.msg == "Illegal trailing comma before end of array":  # Python 3.13's; before, the value behind
                        end = e.pos + 1 + len(text[e.pos + 1 :]) - len(text[e.pos + 1 :].lstrip())
                        line, column = text.count("\n", 0, end) + 1, end - text.rfind("\n", 0, end)
                        told.add(f"{path}:{line}:{column}: not valid JSON: Expecting value")
                    assert str(caught.value).startswith(tuple(told))
                return
            if isinstance(entries, list):
                found = list(open_records(path))
                assert len(found) == len(entries)
                for item, entry in zip(found, entries, strict=True):
                    if isinstance(entry, dict):
                        assert repr(item.fields) == repr(entry)  # type: ignore[union-attr]  # NaN is not itself
                    else:
                        assert isinstance(item, DataError)

    def test_bytes_that_are_not_utf8_are_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(json_text, "CHUNK", 4)
        path = tmp_path / "d.json"
        path.write_bytes(b'[\n{"a": "\xc3\xa9"},\n{"a": "\xff"}]')
        with refused("encoding", "d.json:3", "UTF-8", "0xff", 22, error=DataError):
            list(open_records(path))


class TestKept:
    """An index on disk is used again exactly as long as it is true."""

    @pytest.fixture
    def passes(self, monkeypatch: pytest.MonkeyPatch, kept: None) -> list[int]:
        made: list[int] = []
        real = index._make
        monkeypatch.setattr(index, "_make", lambda *a: (made.append(1), real(*a))[1])
        return made

    def test_found_again_until_the_file_changes(self, media: Path, tmp_path: Path, passes: list[int]) -> None:
        spec = some(tmp_path, media, 20)
        assert len(load_data(spec)) == len(load_data(spec)) == 20 and len(passes) == 1
        some(tmp_path, media, 21)
        assert len(load_data(spec)) == 21 and len(passes) == 2
        assert len(load_data(spec.model_copy(update={"limit": 5}))) == 5 and len(passes) == 3

    def test_bad_samples_are_told_again(self, media: Path, tmp_path: Path, passes: list[int]) -> None:
        spec = some(tmp_path, media, 3)
        Path(spec.path).write_text(Path(spec.path).read_text() + "{\n")
        for _ in range(2):
            told: list[DataError] = []
            assert len(load_data(spec, on_error=told.append)) == 3
            assert [(e.kind, e.where.rpartition(":")[0][-12:]) for e in told] == [("json", "some.jsonl:4")]
        with refused("json", "some.jsonl:4", error=DataError):
            load_data(spec)
        assert len(passes) == 1

    def test_a_picture_that_comes_or_goes_is_noticed(self, tmp_path: Path, passes: list[int]) -> None:
        media = tmp_path / "media"
        media.mkdir()
        for name in NAMES[:5]:
            PIL.Image.new("RGB", (2, 2)).save(media / name)
        os.utime(media, ns=(10**18, 10**18))
        spec = some(tmp_path, media, 6)
        told: list[DataError] = []
        assert len(load_data(spec, on_error=told.append)) == 5 and "5.png" in str(told[0])
        PIL.Image.new("RGB", (2, 2)).save(media / NAMES[5])
        assert len(load_data(spec)) == 6
        (media / NAMES[0]).unlink()
        with refused("missing-image", "0.png", error=DataError):
            load_data(spec)

    def test_a_folder_that_has_just_changed_is_looked_at_again(self, tmp_path: Path, passes: list[int]) -> None:
        """A picture may be deleted within the same tick of the clock in which it was seen."""
        PIL.Image.new("RGB", (2, 2)).save(tmp_path / NAMES[0])
        spec = some(tmp_path, tmp_path, 1)
        load_data(spec)
        load_data(spec)
        assert len(passes) == 2

    def test_a_file_that_changes_under_way_is_not_misread(self, media: Path, tmp_path: Path) -> None:
        spec = some(tmp_path, media, 5)
        found = load_data(spec)
        Path(spec.path).write_text("x")
        with refused("changed-file", "some.jsonl", error=DataError):
            found[4]


GROWTH = """
import resource, sys
from opticnerve.data.dataset.load import load_examples
from opticnerve.recipe import DataSpec
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
examples = load_examples([DataSpec(path=sys.argv[1])])
assert len(examples) == int(sys.argv[2]) and examples[-1][0][0].id == str(len(examples) - 1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_rows(tmp_path: Path) -> None:
    """8,000 samples, 8 MB of JSON on one line: as objects they took 47 MiB."""
    path = tmp_path / "d.json"
    turns = [{"from": who, "value": "word " * 25} for who in ("human", "gpt") * 3]
    path.write_text(json.dumps([{"id": str(n), "conversations": turns} for n in range(8_000)]))
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(path), "8000"], check=True, capture_output=True, text=True,
        env={**os.environ, "OPTICNERVE_CACHE": str(tmp_path)},
    )  # fmt: skip
    assert int(done.stdout) < 14 << 10  # KiB
