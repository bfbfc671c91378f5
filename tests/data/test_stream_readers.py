"""Streams of files and of data sets laid out as on the hub: rows, their names, and what is broken in them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import httpx
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from errors import refused
from opticnerve.data.dataset.load import load_data, load_examples, stream_data
from opticnerve.data.dataset.read import DataSource
from opticnerve.data.dataset.streaming import Stream
from opticnerve.data.media.open import open_image
from opticnerve.data.sources import streaming as hub
from opticnerve.data.sources import tables as groups
from opticnerve.data.sources.base import Record, Streaming
from opticnerve.data.sources.streaming import Streamed
from opticnerve.recipe import DataSpec
from opticnerve.types import Conversation, DataError

pytestmark = pytest.mark.usefixtures("private_cache")


def png(shade: int = 7) -> bytes:
    made = io.BytesIO()
    PIL.Image.new("L", (3, 2), shade).save(made, "PNG")
    return made.getvalue()


def parquet(path: Path, first: int, count: int, *, group: int = 4) -> Path:
    """Captions with their pictures, `group` rows to a group, as data sets on the hub are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = range(first, first + count)
    pictures = [{"bytes": png(n % 256), "path": f"{n}.png"} for n in numbers]
    table = pa.table({"image": pictures, "caption": [f"no. {n}" for n in numbers]})
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    pq.write_table(table.cast(features.arrow_schema), path, row_group_size=group)
    return path


def repository(folder: Path, sizes: tuple[int, ...] = (10, 10, 10), *, group: int = 4) -> Path:
    """A folder laid out as a data set on the hub is: shards of a train split, and a test split."""
    for n, size in enumerate(sizes):
        parquet(folder / "data" / f"train-{n:05d}-of-{len(sizes):05d}.parquet", 100 * n, size, group=group)
    parquet(folder / "data" / "test-00000-of-00001.parquet", 900, 3)
    return folder


def damage(path: Path, group: int) -> None:
    """Overwrite the captions of a row group."""
    column = pq.ParquetFile(path).metadata.row_group(group).column(2)
    start = column.dictionary_page_offset or column.data_page_offset
    raw = bytearray(path.read_bytes())
    raw[start : start + 16] = bytes(b ^ 0xFF for b in raw[start : start + 16])
    path.write_bytes(raw)


def rows(found: Any) -> list[str]:
    return [f"bad {Path(r.where).name}" if isinstance(r, DataError) else r.fields["caption"] for r in found]


def found(path: Any, **options: Any) -> tuple[list[Conversation], list[DataError]]:
    errors: list[DataError] = []
    spec = DataSpec(path=str(path), streaming=True, **options)
    return list(stream_data(spec, on_error=errors.append)), errors


class TestHub:
    def test_the_rows_of_a_split_with_their_pictures(self, tmp_path: Path) -> None:
        conversations, errors = found(repository(tmp_path / "set"))
        assert not errors
        assert [c.answer for c in conversations] == [
            f"no. {n}" for n in (*range(10), *range(100, 110), *range(200, 210))
        ]
        assert open_image(conversations[12].images[0].source, where="").getpixel((0, 0)) == (102, 102, 102)
        assert conversations[12].id == "train-00001-of-00003-2"
        assert conversations[12].where.endswith("train-00001-of-00003.parquet[2]")
        assert [c.answer for c in found(tmp_path / "set", hub_split="test")[0]] == ["no. 900", "no. 901", "no. 902"]

    def test_from_any_row_on(self, tmp_path: Path) -> None:
        records = Streamed(repository(tmp_path / "set"), Streaming())
        whole = rows(records.rows(1))
        for start in range(12):
            assert rows(records.rows(1, start)) == whole[start:]
            assert all(isinstance(r, Record) and r.index == start + k for k, r in enumerate(records.rows(1, start)))

    @pytest.mark.parametrize(("group", "good"), [(0, 0), (1, 4), (2, 8)])
    def test_a_damaged_shard_is_one_bad_row_and_costs_nothing_else(self, tmp_path: Path, group: int, good: int) -> None:
        folder = repository(tmp_path / "set")
        damage(folder / "data" / "train-00001-of-00003.parquet", group)
        records = Streamed(folder, Streaming())
        bad = f"bad train-00001-of-00003.parquet[{good}]"
        assert rows(records.rows(1)) == [*(f"no. {n}" for n in range(100, 100 + good)), bad]
        assert len(rows(records)) == 20 + good + 1
        for start in range(good + 1):  # wherever one goes on, it is told
            assert rows(records.rows(1, start)) == rows(records.rows(1))[start:]
        _, errors = found(folder)
        assert [e.kind for e in errors] == ["shard"]
        assert "the shard is damaged from here on: " in errors[0].problem

    @pytest.mark.parametrize("window", [1, 3, 7])
    def test_going_on_around_a_damaged_shard(self, tmp_path: Path, window: int) -> None:
        folder = repository(tmp_path / "set")
        damage(folder / "data" / "train-00001-of-00003.parquet", 1)

        def opened() -> Stream:
            return Stream(DataSource(folder, stream=Streaming()), key="k", window=window)

        whole = opened()
        wanted = rows(whole.row(v) for v in range(60))
        assert whole.length == 10 + 5 + 10
        for stopped in range(50):
            after = opened()
            after.load_state_dict(whole.state_dict())
            assert rows(after.row(v) for v in range(stopped, stopped + 10)) == wanted[stopped : stopped + 10]

    def test_a_shard_that_was_cut_off(self, tmp_path: Path) -> None:
        folder = repository(tmp_path / "set")
        shard = folder / "data" / "train-00002-of-00003.parquet"
        shard.write_bytes(shard.read_bytes()[:500])
        conversations, errors = found(folder)
        assert len(conversations) == 20
        assert [Path(e.where).name for e in errors] == ["train-00002-of-00003.parquet[0]"]

    def test_the_network_fails_for_a_while(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pauses = self.broken(monkeypatch, times=2 * hub.TRIES, each=hub.TRIES)
        records = Streamed(repository(tmp_path / "set", (200,), group=64), Streaming())
        assert rows(records.rows(0)) == [f"no. {n}" for n in range(200)]
        assert pauses == [5.0, 10.0, 20.0] * 2

    def test_the_network_fails_for_good(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """No bad sample, which a recipe might skip: the run stops, and says where."""
        self.broken(monkeypatch, times=100, each=100)
        records = Streamed(repository(tmp_path / "set", (200,), group=64), Streaming())
        read = []
        with refused("network", "parquet[64]", 3, "--resume") as e:
            read += list(records.rows(0))
        assert not isinstance(e.value, DataError)

    def broken(self, monkeypatch: pytest.MonkeyPatch, times: int, each: int) -> list[float]:
        """The second batch fails, `each` times in a row, then the third, until it has failed `times` times."""
        pauses: list[float] = []
        monkeypatch.setattr(hub.time, "sleep", pauses.append)
        whole, failed = hub.batches, [0]

        def batches(name: str, start: int) -> Any:
            for first, table in whole(name, start):
                if first and failed[0] < times and first == 64 * (1 + failed[0] // each):
                    failed[0] += 1
                    raise OSError("read failed") from httpx.ReadTimeout("timed out")
                yield first, table

        monkeypatch.setattr(hub, "batches", batches)
        return pauses

    def test_an_error_of_our_own_is_no_bad_row(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def tables(*_: Any) -> Any:
            raise ZeroDivisionError
            yield

        monkeypatch.setattr(hub.HubShards, "_tables", tables)
        with pytest.raises(ZeroDivisionError):
            list(Streamed(repository(tmp_path / "set"), Streaming()))

    def test_values_of_mixed_types(self, tmp_path: Path) -> None:
        """Chat's `content` is a text or a list; `datasets` carries such columns as JSON."""
        parts = [{"type": "image", "image": "1.png"}, {"type": "text", "text": "what?"}]
        lines = [
            {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]}
            for content in ("hello", parts)
        ]
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines * 2))
        (tmp_path / "set" / "1.png").write_bytes(png())
        conversations, errors = found(tmp_path / "set")
        assert not errors
        assert [(c.messages[0].text, len(c.images)) for c in conversations] == [("hello", 0), ("what?", 1)] * 2

    def test_webdataset_shards(self, tmp_path: Path) -> None:
        (tmp_path / "set").mkdir()
        for shard in range(2):
            with tarfile.open(tmp_path / "set" / f"{shard:05d}.tar", "w") as tar:
                for n in range(6):
                    for ending, raw in (("png", png(n)), ("txt", f"no. {shard}{n}".encode())):
                        about = tarfile.TarInfo(f"{shard}{n:03d}.{ending}")
                        about.size = len(raw)
                        tar.addfile(about, io.BytesIO(raw))
        conversations, errors = found(tmp_path / "set")
        assert not errors
        assert [c.answer for c in conversations] == [f"no. {s}{n}" for s in range(2) for n in range(6)]
        assert [c.id for c in conversations][6] == "1000"
        assert open_image(conversations[5].images[0].source, where="").getpixel((0, 0)) == (5, 5, 5)

    @pytest.mark.parametrize(
        ("options", "refusal"),
        [
            ({"hub_split": "nope"}, ("missing-file", "nope", "['train', 'test']")),
            ({"subset": "nope"}, ("missing-file", "BuilderConfig", "'nope'")),
        ],
    )
    def test_what_it_does_not_have(self, tmp_path: Path, options: Any, refusal: tuple[Any, ...]) -> None:
        with refused(*refusal, error=DataError):
            found(repository(tmp_path / "set"), **options)

    def test_a_hub_that_cannot_be_reached(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

        def unreachable(*_: Any, **__: Any) -> Any:
            raise ConnectionError("Couldn't reach 'some/data-set' on the Hub")

        monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
        with refused("missing-file", "some/data-set", "Couldn't reach", error=DataError):
            found("some/data-set")

    def test_pictures_are_not_looked_for_on_this_machine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A row of the hub that names a file gets none of ours."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "1.png").write_bytes(png())
        whole = repository(tmp_path / "set")
        pq.write_table(
            pa.table({"image": ["1.png"], "caption": ["a"]}), whole / "data" / "train-00000-of-00003.parquet"
        )
        build = datasets.load_dataset_builder
        (whole / "data" / "train-00001-of-00003.parquet").unlink()
        (whole / "data" / "train-00002-of-00003.parquet").unlink()
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda path, *a, **k: build(str(whole), *a, **k))
        _, errors = found("some/data-set", limit=1, format="captions")
        assert [e.kind for e in errors][:1] == ["missing-image"]


class TestFiles:
    def test_as_without_streaming(self, tmp_path: Path) -> None:
        (tmp_path / "1.png").write_bytes(png())
        lines = [json.dumps({"image": "1.png", "caption": f"no. {n}"}) for n in range(6)]
        lines[3] = "{oops"
        (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
        (tmp_path / "a.json").write_text("[" + ",".join(x for x in lines if x != "{oops") + "]")
        (tmp_path / "a.csv").write_text("image,caption\n" + "".join(f"1.png,no. {n}\n" for n in range(6)))
        parquet(tmp_path / "a.parquet", 0, 6)
        for kind in ("jsonl", "json", "csv", "parquet"):
            errors: list[DataError] = []
            plain = list(load_data(DataSpec(path=str(tmp_path / f"a.{kind}")), on_error=errors.append))
            conversations, others = found(tmp_path / f"a.{kind}")
            assert [c.messages for c in conversations] == [c.messages for c in plain]
            assert [str(e) for e in others] == [str(e) for e in errors]
        assert [c.id for c in conversations[:2]] == ["a-0", "a-1"]

    def test_damaged_and_missing_shards(self, tmp_path: Path) -> None:
        for n in (0, 1, 3):
            parquet(tmp_path / f"s{n}.parquet", 100 * n, 70, group=64)
        damage(tmp_path / "s1.parquet", 1)
        records = Streamed(f"{tmp_path}/s{{0..3}}.parquet", Streaming())
        told = rows(records)
        assert len(told) == 70 + 65 + 1 + 70
        assert told[134] == "bad s1.parquet[64]"
        assert told[135] == "bad s2.parquet[0]"
        for start in (0, 63, 64):
            assert rows(records.rows(1, start)) == rows(records.rows(1))[start:]

    @pytest.mark.parametrize(
        ("make", "options", "refusal"),
        [
            (lambda p: p / "no.jsonl", {}, ("missing-file", "no.jsonl")),
            (lambda p: (p / "a.xml").write_text("x") and p / "a.xml", {}, ("format", "a.xml")),
            (lambda p: parquet(p / "a.parquet", 0, 1), {"subset": "x"}, ("format", "a.parquet", "subset")),
        ],
    )  # fmt: skip
    def test_refused(self, tmp_path: Path, make: Any, options: Any, refusal: tuple[Any, ...]) -> None:
        with refused(*refusal, error=DataError):
            found(make(tmp_path), **options)

    def test_a_saved_folder_needs_no_stream(self, tmp_path: Path) -> None:
        datasets.Dataset.from_dict({"caption": ["a"]}).save_to_disk(str(tmp_path / "saved"))
        with refused("format", "saved", "streaming", error=DataError):
            found(tmp_path / "saved")


def test_a_row_group_is_found_without_reading_what_comes_before(tmp_path: Path) -> None:
    """On a file system that is none of this machine's, as the hub's is."""
    import fsspec

    raw = parquet(tmp_path / "a.parquet", 0, 400, group=50).read_bytes()
    with fsspec.open("memory://stream/a.parquet", "wb") as file:
        file.write(raw)
    for start in (0, 49, 50, 333, 399, 400):
        read = [(first + k, row["caption"]) for first, table in groups.batches("memory://stream/a.parquet", start)
                for k, row in enumerate(table.to_pylist())]  # fmt: skip
        assert read == [(n, f"no. {n}") for n in range(start, 400)]
    damage(tmp_path / "a.parquet", 0)
    assert sum(t.num_rows for _, t in groups.batches(str(tmp_path / "a.parquet"), 50)) == 350
    with pytest.raises(OSError, match="thrift"):
        next(groups.batches(str(tmp_path / "a.parquet"), 49))


class TestWhoeverWantsAll:
    def test_the_first_so_many_or_an_error(self, tmp_path: Path) -> None:
        path = str(repository(tmp_path / "set"))
        first = load_data(DataSpec(path=path, streaming=True, limit=12))
        assert [c.answer for c in first][-2:] == ["no. 100", "no. 101"]
        with refused("unsupported", "set", "limit"):
            load_data(DataSpec(path=path, streaming=True))
        with refused("unsupported", "set"):
            load_examples([DataSpec(path=path, streaming=True, limit=3)])
