"""Files as they are met: other delimiters, stray quotes, COCO's captions, lines under .json, splits side by side, names
that stand twice, missing numbers."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import datasets
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opticnerve.data.dataset.load import load_data, stream_data
from opticnerve.data.dataset.read import read
from opticnerve.recipe import DataSpec
from opticnerve.types import Conversation, DataError

pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    PIL.Image.new("RGB", (4, 4), "red").save(tmp_path / "1.png")
    return tmp_path


def found(path: Any, **options: Any) -> tuple[list[Conversation], list[DataError]]:
    """Indexed; and each sample is found again as it was read."""
    bad: list[DataError] = []
    samples = list(load_data(DataSpec(path=str(path), **options), on_error=bad.append))
    if not options.get("streaming"):
        again = stream_data(DataSpec(path=str(path), **options), on_error=lambda e: None)
        assert [(c.id, c.where, c.messages) for c in again] == [(c.id, c.where, c.messages) for c in samples]
    return samples, bad


def answers(path: Any, **options: Any) -> list[str]:
    samples, bad = found(path, **options)
    assert not bad, bad
    return [str(c.answer) for c in samples]


def refused(path: Any, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        found(path, **options)
    return caught.value


class TestQuotes:
    @pytest.mark.parametrize(
        ("lines", "wanted"),
        [
            (['1.png,"a red thing', "1.png,b", "1.png,c"], ["b", "c"]),
            (['1.png,"Hello', '1.png,she said "hi"', '1.png,said she"', "1.png,c"], ['she said "hi"', 'said she"', "c"]),
            (['1.png,"Hello there', *["1.png,b"] * 5, '1.png,he said"', "1.png,c"], [*["b"] * 5, 'he said"', "c"]),
            (['1.png,"Hello', '1.png,"a, b"', "1.png,c"], ["a, b", "c"]),
            (["1.png,a", *["1.png,b"] * 3_000, '1.png,"open', *["1.png,c"] * 3_000], ["a", *["b"] * 3_000, *["c"] * 3_000]),
            (['1.png,"two', 'lines, and', 'a comma"', "1.png,c"], ["two\nlines, and\na comma", "c"]),
            (['1.png,"she said ""hi"""', "1.png,c"], ['she said "hi"', "c"]),
        ],
        ids=str,
    )  # fmt: skip
    @pytest.mark.parametrize("delimiter", ["csv ,", "tsv \t", "csv ;", "csv |"])
    def test_one_costs_its_row(self, folder: Path, lines: list[str], wanted: list[str], delimiter: str) -> None:
        suffix, sign = delimiter.split(" ")
        path = folder / f"d.{suffix}"
        path.write_text("".join(line.replace("1.png,", f"1.png{sign}") + "\n" for line in ["image,caption".replace(",", sign), *lines]))  # fmt: skip
        samples, bad = found(path)
        assert [c.answer for c in samples] == wanted
        assert all(e.kind == "csv" for e in bad)
        assert len(bad) <= 1

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.text('ab", \n', min_size=1, max_size=6).filter(str.strip), min_size=1, max_size=8),
        st.integers(0, 7),
    )
    def test_wherever_it_stands(self, tmp_path_factory: pytest.TempPathFactory, captions: list[str], at: int) -> None:
        """What a writer of CSV wrote is read; a stray quote takes no other row with it."""
        import csv

        folder = tmp_path_factory.mktemp("quotes")
        PIL.Image.new("RGB", (4, 4)).save(folder / "1.png")
        out = io.StringIO()
        rows = csv.writer(out, lineterminator="\n")
        rows.writerows([["image", "caption"], *(["1.png", c] for c in captions)])
        (folder / "d.csv").write_text(out.getvalue(), newline="")
        assert [c.answer for c in found(folder / "d.csv")[0]] == captions
        plain = [f"1.png,row {n}" for n in range(8)]
        plain[at] = f'1.png,"row {at}'
        (folder / "d.csv").write_text("image,caption\n" + "\n".join(plain) + "\n")
        samples, bad = found(folder / "d.csv")
        assert [c.answer for c in samples] == [f"row {n}" for n in range(8) if n != at]
        assert [e.where for e in bad] == [f"{folder / 'd.csv'}:{at + 2}"]


class TestTables:
    def test_flickr_s_bars(self, folder: Path) -> None:
        (folder / "results.csv").write_text(
            "image_name| comment_number| comment\n1.png| 0| A red thing .\n1.png| 1| Red\n"
        )
        assert answers(folder / "results.csv") == ["A red thing .", "Red"]

    def test_missing_numbers(self, folder: Path) -> None:
        rows = {"image": ["1.png"] * 4, "question": ["how many?"] * 4}
        table = pa.table({**rows, "answer": pa.array([1.0, float("nan"), None, 2.5], pa.float64())})
        pq.write_table(table, folder / "d.parquet")
        for streaming in ({}, {"streaming": True, "limit": 9}):
            samples, bad = found(folder / "d.parquet", **streaming)
            assert ([c.answer for c in samples], [e.kind for e in bad]) == (["1", "2.5"], ["missing-field"] * 2)
        (folder / "d.csv").write_text("image,question,answer\n1.png,a?,NaN\n1.png,a?,\n1.png,a?,nan\n1.png,a?,7\n")
        samples, bad = found(folder / "d.csv")
        assert ([c.answer for c in samples], len(bad)) == (["7"], 3)

    @pytest.mark.parametrize("streaming", [{}, {"streaming": True, "limit": 9}])
    def test_two_columns_of_one_name(self, folder: Path, streaming: Any) -> None:
        (folder / "d.csv").write_text("image,caption,caption\n1.png,a,b\n")
        twice = pa.table([pa.array(["1.png"]), pa.array(["a"]), pa.array(["b"])], ["image", "caption", "caption"])
        pq.write_table(twice, folder / "d.parquet")
        for kind in ("csv", "parquet"):
            with pytest.raises(DataError) as caught:
                _, bad = found(folder / f"d.{kind}", **streaming)
                raise bad[0]
            assert "caption" in str(caught.value) or caught.value.kind == "format"

    @pytest.mark.parametrize("record", ['{"image": "1.png", "image": "2.png", "caption": "a"}',
                                        '{"messages": [{"role": "user", "content": "a", "content": "b"}]}'])  # fmt: skip
    @pytest.mark.parametrize("suffix", ["json", "jsonl"])
    def test_two_keys_of_one_name(self, folder: Path, record: str, suffix: str) -> None:
        lines = ['{"image": "1.png", "caption": "x"}', record, '{"image": "1.png", "caption": "y"}']
        (folder / f"d.{suffix}").write_text("[" + ",\n".join(lines) + "]" if suffix == "json" else "\n".join(lines))
        samples, bad = found(folder / f"d.{suffix}")
        assert ([c.answer for c in samples], [e.kind for e in bad]) == (["x", "y"], ["json"])

    @pytest.mark.parametrize("order", ["1.png 1.txt 1.png 2.png 2.txt", "1.png 1.txt 2.png 2.txt 1.png 1.txt"])
    def test_two_members_of_one_name(self, folder: Path, order: str) -> None:
        with tarfile.open(folder / "d.tar", "w") as tar:
            for number, name in enumerate(order.split()):
                raw = (folder / "1.png").read_bytes() if name.endswith("png") else f"no. {number}".encode()
                about = tarfile.TarInfo(name)
                about.size = len(raw)
                tar.addfile(about, io.BytesIO(raw))
        samples, bad = found(folder / "d.tar")
        assert [e.kind for e in bad] == ["shard"] and len(samples) == order.count("2.txt") + (order.endswith("1.txt"))


class TestJson:
    @pytest.mark.parametrize("ends", ["\n", "\r\n", "\n\n"])
    @pytest.mark.parametrize("count", [1, 3])
    def test_lines_under_json(self, folder: Path, ends: str, count: int) -> None:
        line = json.dumps({"image": "1.png", "caption": "a"})
        (folder / "d.json").write_bytes(("\ufeff" + (line + ends) * count).encode())
        assert answers(folder / "d.json") == ["a"] * count

    def test_a_broken_line_costs_itself(self, folder: Path) -> None:
        line = json.dumps({"image": "1.png", "caption": "a"})
        for lines in (['{"image" "1.png"}', line, line], [line, "{oops", line]):
            (folder / "d.json").write_text("\n".join(lines))
            samples, bad = found(folder / "d.json")
            assert (len(samples), [e.kind for e in bad]) == (2, ["json"])

    COCO: ClassVar[dict[str, Any]] = {
        "info": {"year": 2014},
        "images": [{"id": 1, "file_name": "1.png", "coco_url": "http://x/1.jpg"}, {"id": 2, "file_name": "gone.png"}],
        "annotations": [{"id": 5, "image_id": 1, "caption": "red"}, {"id": 6, "image_id": 2, "caption": "gone"},
                        {"id": 7, "image_id": 3, "caption": "of none"}, {"id": 8, "image_id": 1, "caption": "青"}],
    }  # fmt: skip

    @pytest.mark.parametrize("indent", [None, 1])
    def test_coco_s_captions(self, folder: Path, indent: int | None) -> None:
        (folder / "captions.json").write_text(json.dumps(self.COCO, indent=indent))
        samples, bad = found(folder / "captions.json")
        assert [(c.id, c.answer) for c in samples] == [("5", "red"), ("8", "青")]
        assert [e.kind for e in bad] == ["missing-image", "missing-field"]

    @pytest.mark.parametrize(
        "whole", ['{"a": [1]}', '{"images": [], "annotations": [{"bbox": [1]}]}', "{", '{"images": 1}\n', "7"]
    )
    def test_other_objects_are_refused(self, folder: Path, whole: str) -> None:
        (folder / "d.json").write_text(whole)
        assert refused(folder / "d.json").kind == "json"


def jsonl(path: Path, *captions: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"image": "1.png", "caption": c}) + "\n" for c in captions))


def parquet(path: Path, *captions: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": ["1.png"] * len(captions), "caption": list(captions)}), path)


def imagefolder(path: Path, *captions: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (4, 4), "red").save(path.parent / "own.png")
    path.write_text("file_name,text\n" + "".join(f"own.png,{c}\n" for c in captions))


def shard(path: Path, *captions: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    png = io.BytesIO()
    PIL.Image.new("RGB", (4, 4)).save(png, "PNG")
    with tarfile.open(path, "w") as tar:
        for number, caption in enumerate(captions):
            for ending, raw in (("png", png.getvalue()), ("txt", caption.encode())):
                about = tarfile.TarInfo(f"{path.stem}-{number}.{ending}")
                about.size = len(raw)
                tar.addfile(about, io.BytesIO(raw))


LAYOUTS = [
    (parquet, "train-00000-of-00001.parquet", "test-00000-of-00001.parquet"), (parquet, "data/train.parquet", "data/val.parquet"),
    (parquet, "data/train_sft-00000-of-00001.parquet", "data/train_gen-00000-of-00001.parquet"), (jsonl, "train.jsonl", "dev.jsonl"),
    (jsonl, "training/a.jsonl", "validation/a.jsonl"), (jsonl, "my_train_2.jsonl", "my_eval_2.jsonl"),
    (imagefolder, "train/metadata.csv", "test/metadata.csv"), (shard, "train-000.tar", "test-000.tar"),
]  # fmt: skip


# datasets leaves the metadata of an imagefolder open until the garbage collector comes.
LEFT_OPEN = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@LEFT_OPEN
class TestSplits:
    @pytest.mark.parametrize(("write", "train", "test"), LAYOUTS, ids=lambda v: getattr(v, "__name__", v))
    def test_never_read_as_one(self, folder: Path, write: Any, train: str, test: str) -> None:
        data = folder / "set"
        write(data / train, "a", "b")
        write(data / test, "secret")
        media = {} if write is not jsonl and write is not parquet else {"media": str(folder)}
        told = refused(data, **media)
        assert told.kind == "format" and "train" in told.problem and "hub_split" in told.remedy
        name = "train_sft" if "sft" in train else "train"
        assert answers(data, hub_split=name, **media) == ["a", "b"]
        assert refused(data, hub_split="nope", **media).kind == "format"
        if write is shard:
            assert refused(data / "*.tar").kind == "format" and answers(data / "train-*.tar") == ["a", "b"]
            with pytest.raises(DataError):
                found(data / "*.tar", streaming=True, limit=9)
        else:
            assert answers(data, hub_split=name, streaming=True, limit=9, **media) == ["a", "b"]

    def test_one_split_needs_no_name(self, folder: Path) -> None:
        jsonl(folder / "set/part-0.jsonl", "a")
        jsonl(folder / "set/part-1.jsonl", "b")
        samples, _ = found(folder / "set", media=str(folder))
        assert [(c.id, c.answer, c.where) for c in samples] == [
            ("part-0-1", "a", f"{folder / 'set/part-0.jsonl'}:1"), ("part-1-1", "b", f"{folder / 'set/part-1.jsonl'}:1")
        ]  # fmt: skip
        jsonl(folder / "contest/latest.jsonl", "a")  # the words are none
        jsonl(folder / "contest/strain.jsonl", "b")
        assert answers(folder / "contest", media=str(folder)) == ["a", "b"]

    def test_saved_by_datasets(self, folder: Path) -> None:
        both = {name: datasets.Dataset.from_dict({"image": ["1.png"], "caption": [name]}) for name in ("train", "test")}
        datasets.DatasetDict(both).save_to_disk(str(folder / "set"))
        assert refused(folder / "set", media=str(folder)).kind == "format"
        for name in both:
            assert answers(folder / "set", hub_split=name, media=str(folder)) == [name]


@LEFT_OPEN
def test_an_imagefolder_is_read_alike_streamed_and_not(folder: Path) -> None:
    imagefolder(folder / "set/metadata.csv", "a", "b")
    plain, streamed = (found(folder / "set", **o)[0] for o in ({}, {"streaming": True, "limit": 9}))
    assert [c.answer for c in plain] == [c.answer for c in streamed] == ["a", "b"]
    assert all(c.images for c in (*plain, *streamed))


def test_mixed_columns_are_read_alike(folder: Path) -> None:
    """`datasets` writes chat's `content`, a text here and a list there, as JSON."""
    parts = [{"type": "image", "image": "1.png"}, {"type": "text", "text": "what?"}]
    says = [{"role": "user", "content": c} for c in ("hello", parts)]
    lines = [{"messages": [said, {"role": "assistant", "content": "yes"}]} for said in says]
    made = datasets.Dataset.from_list(lines, on_mixed_types="use_json")
    made.to_parquet(str(folder / "d.parquet"))
    plain, streamed = (found(folder / "d.parquet", **o)[0] for o in ({}, {"streaming": True, "limit": 9}))
    assert [c.messages for c in plain] == [c.messages for c in streamed]


def test_an_error_is_never_longer_than_a_screen(folder: Path) -> None:
    for row in ({"image": "x" * 100_000 + ".png", "caption": "a"}, {"image": {"a" * 90_000: 1}, "caption": "a"},
                {"messages": [{"role": "r" * 90_000, "content": "a\n" * 90_000}]}, {"k" * 9_999 + str(n): 1 for n in range(99)}):  # fmt: skip
        (folder / "d.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(DataError) as caught:
            list(read(folder / "d.jsonl"))
        assert len(str(caught.value)) < 2_000 and str(caught.value).count("\n") < 24
