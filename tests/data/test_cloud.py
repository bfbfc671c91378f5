"""Data in a cloud: files, folders and patterns brought here once, streams of which nothing is kept, pictures that lie beside
them; what goes wrong is one sentence with a remedy. By a file system in memory, a server that speaks S3, and a hub."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import png, put
from typer.testing import CliRunner

from errors import refused
from hub import serving
from opticnerve.cli.main import app
from opticnerve.common import atomic
from opticnerve.common.cache import cache_dir
from opticnerve.data.dataset.convert import convert
from opticnerve.data.dataset.load import load_data, load_examples, stream_data
from opticnerve.data.media import cloud
from opticnerve.data.sources.cloud import local_copy
from opticnerve.models.vlm.build import dock
from opticnerve.objectives.next_token import NextToken
from opticnerve.recipe import Stage
from opticnerve.recipe.loading import data_entry
from opticnerve.train.sampler import StageSampler
from opticnerve.types import Conversation, DataError, OpticNerveError

ROWS = [{"image": f"images/{n}.png", "caption": f"picture {n}"} for n in (1, 2)]


def shard(number: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in ((f"{number}.png", png()), (f"{number}.txt", b"shard %d" % number)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def table(rows: int) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(
        pa.Table.from_pylist(
            [{"image": {"bytes": png(), "path": "x.png"}, "caption": f"row {n}"} for n in range(rows)]
        ),
        out,
    )
    return out.getvalue()


FILES = {
    "set/d.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(), "set/images/1.png": png(), "set/images/2.png": png(),
    **{f"shards/{n:03d}.tar": shard(n) for n in range(3)},
    **{f"table/train-{n:05d}-of-00002.parquet": table(3) for n in range(2)},
}  # fmt: skip
READ = [
    ("set/d.jsonl", ["picture 1", "picture 2"]), ("set/*.jsonl", ["picture 1", "picture 2"]), ("set", ["picture 1", "picture 2"]),
    ("shards/000.tar", ["shard 0"]), ("shards/{000..002}.tar", ["shard 0", "shard 1", "shard 2"]), ("shards/{001,002}.tar", ["shard 1", "shard 2"]),
    ("shards/*.tar", ["shard 0", "shard 1", "shard 2"]), ("shards/", ["shard 0", "shard 1", "shard 2"]),
    ("table/train-00000-of-00002.parquet", ["row 0", "row 1", "row 2"]), ("table/*.parquet", ["row 0", "row 1", "row 2"] * 2),
]  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTICNERVE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A file system in memory, and its address."""
    import fsspec

    monkeypatch.setattr(cloud, "CLOUD", ("memory://",))
    system = fsspec.filesystem("memory")
    for name, content in FILES.items():
        system.pipe(f"/bucket/{name}", content)
    yield "memory://bucket"
    for name in [name for name in system.store if name.startswith("/bucket/")]:
        del system.store[name]


def answers(samples: Any) -> list[str]:
    return [sample.answer for sample in samples]


def told(path: str, **options: Any) -> tuple[list[Conversation], list[DataError]]:
    bad: list[DataError] = []
    return list(stream_data(data_entry({"path": path, **options}), on_error=bad.append)), bad


@pytest.mark.parametrize(("path", "said"), READ)
def test_files_folders_and_patterns(tmp_path: Path, bucket: str, path: str, said: list[str]) -> None:
    """Brought here, and as a stream."""
    given = {"path": f"{bucket}/{path}", "media_cache": str(tmp_path / "media")}
    found = load_data(data_entry(given))
    assert answers(found) == said
    for picture in (sample.images[0].source for sample in found):
        assert (picture.read_bytes() if isinstance(picture, Path) else picture) == png()
    if path != "set":  # a stream names its files
        samples, bad = told(**given, streaming=True)
        assert (answers(samples), bad) == (said, [])
        assert all(sample.where.startswith(bucket) for sample in samples)


def test_once_for_each_state(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    system, got = fsspec.filesystem("memory"), list[str]()
    monkeypatch.setattr(system, "get_file", lambda a, b, **_: got.append(a) or Path(b).write_bytes(system.cat(a)))
    folder = local_copy(f"{bucket}/shards")
    assert local_copy(f"{bucket}/shards") == folder and len(got) == 3
    (folder / "001.tar").unlink()  # as if it had been stopped
    (folder.parent / f".writing-{atomic.partial_of(Path('2')).name}").write_text("cut")
    assert local_copy(f"{bucket}/shards") == folder and len(got) == 4
    system.pipe("/bucket/shards/001.tar", shard(7))
    assert answers(load_data(data_entry({"path": f"{bucket}/shards"}))) == ["shard 0", "shard 7", "shard 2"]


def test_an_earlier_state_goes_once_it_is_unused(bucket: str) -> None:
    """And not before: a run may still open its pictures."""
    import fsspec

    first = local_copy(f"{bucket}/shards")
    fsspec.filesystem("memory").pipe("/bucket/shards/001.tar", shard(7))
    second = local_copy(f"{bucket}/shards")
    assert first.exists() and second.exists() and first != second
    os.utime(first.parents[1] / "lock", (0, 0))
    assert local_copy(f"{bucket}/shards") == second
    assert second.exists() and not first.exists()


def test_a_file_whose_package_finds_its_name_alone(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As adlfs does, whatever `detail` says."""
    import fsspec

    system = fsspec.filesystem("memory")
    find = system.find
    monkeypatch.setattr(system, "find", lambda path, **how: [path] if system.isfile(path) else find(path, **how))
    given = {"path": f"{bucket}/set/d.jsonl", "media_cache": str(tmp_path / "media")}
    assert answers(load_data(data_entry(given))) == ["picture 1", "picture 2"]


def test_errors_name_the_bucket(tmp_path: Path, bucket: str) -> None:
    """Of a file that was brought here, too."""
    import fsspec

    fsspec.filesystem("memory").pipe("/bucket/set/d.jsonl", FILES["set/d.jsonl"] + b"{")
    bad: list[DataError] = []
    load_data(
        data_entry({"path": f"{bucket}/set/d.jsonl", "media_cache": str(tmp_path / "media")}), on_error=bad.append
    )
    assert "memory_bucket_set" in bad[0].where and "/d.jsonl:3" in bad[0].where


def test_nothing_is_kept_of_a_stream(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    samples = stream_data(data_entry({"path": f"{bucket}/shards/*.tar", "streaming": True}))
    next(samples)
    assert [file.name for file in tmp_path.rglob("*.tar")] == ["000.tar"]
    assert len(list(samples)) == 2
    assert not list(tmp_path.rglob("*.tar")) and not (cache_dir() / "remote").exists()


class TestPictures:
    """Whose paths start in a cloud."""

    def test_are_not_fetched_unasked(self, bucket: str) -> None:
        _, bad = told(f"{bucket}/set/d.jsonl")
        assert [e.kind for e in bad] == ["url", "url"]
        assert f"{bucket}/set/images/1.png" in bad[0].problem and "media_cache" in bad[0].remedy

    def test_of_a_data_file_here(self, tmp_path: Path, bucket: str) -> None:
        put(tmp_path / "d.jsonl", [*ROWS, {"image": "images/3.png", "caption": "x"}])
        samples, (bad,) = told(str(tmp_path / "d.jsonl"), media=f"{bucket}/set/", media_cache=str(tmp_path / "media"))
        assert len(samples) == 2
        assert bad.kind == "url" and "no such file" in bad.problem and f"{bucket}/set/images/3.png" in bad.problem

    @pytest.mark.parametrize("name", ["../set/images/1.png", "/etc/passwd", "file:///etc/passwd", "images/../../x.png"])
    def test_of_no_other_folder(self, tmp_path: Path, bucket: str, name: str) -> None:
        put(tmp_path / "d.jsonl", [{"image": name, "caption": "x"}])
        _, (bad,) = told(str(tmp_path / "d.jsonl"), media=f"{bucket}/set", media_cache=str(tmp_path / "media"))
        assert bad.kind == "outside-media"


class TestRefused:
    """In one sentence, with a remedy."""

    @pytest.mark.parametrize("path", ["none.jsonl", "none", "none/*.tar", "shards/{000..004}.tar"])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_what_is_not_there(self, bucket: str, path: str, streaming: bool) -> None:
        with refused("missing-file", error=DataError):
            list(stream_data(data_entry({"path": f"{bucket}/{path}", "streaming": streaming})))

    def test_a_name_that_leads_elsewhere(self, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        import fsspec

        found = {"/bucket/set/../../up.jsonl": {"type": "file", "size": 1}}
        monkeypatch.setattr(fsspec.filesystem("memory"), "find", lambda *_, **__: found)
        with refused("unsupported", "up.jsonl"):
            local_copy(f"{bucket}/set")

    @pytest.mark.parametrize(
        ("error", "kind"),
        [(PermissionError("Forbidden"), "no-permission"), (type("NoCredentialsError", (Exception,), {})("none"), "no-permission"),
         (ConnectionError("gone"), "network"), (type("HttpError", (Exception,), {"code": 403})("no"), "no-permission")],
    )  # fmt: skip
    def test_what_a_package_raises(
        self, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: str
    ) -> None:
        import fsspec

        def fails(*_: Any, **__: Any) -> Any:
            raise error

        monkeypatch.setattr("opticnerve.data.media.web.PAUSE", 0.0)
        system = fsspec.filesystem("memory")
        for name in ("find", "get_file"):
            with monkeypatch.context() as broken:
                broken.setattr(system, name, fails)
                with refused(kind, "memory://bucket/set"):
                    local_copy(f"{bucket}/set")
        put(tmp_path / "d.jsonl", ROWS[:1])
        monkeypatch.setattr(type(system), "open", fails)  # each thread has an instance of its own
        given = {"path": str(tmp_path / "d.jsonl"), "media": f"{bucket}/set", "media_cache": str(tmp_path / "media")}
        if kind == "no-permission":  # for all pictures alike
            with refused(kind):
                told(**given)
        else:
            assert [e.kind for e in told(**given)[1]] == ["url"]

    def test_what_broke_off(self, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        import fsspec

        monkeypatch.setattr(fsspec.filesystem("memory"), "get_file", lambda a, b, **_: Path(b).write_bytes(b"x"))
        with refused("network", "broke off"):
            local_copy(f"{bucket}/shards/000.tar")

    @pytest.mark.parametrize(("address", "package"), [("s3://b/d.jsonl", "s3fs"), ("gs://b/d.jsonl", "gcsfs")])
    def test_a_package_that_is_missing(self, monkeypatch: pytest.MonkeyPatch, address: str, package: str) -> None:
        import fsspec  # noqa: F401

        monkeypatch.setitem(sys.modules, package, None)
        seen = sys.modules["fsspec.registry"]._registry
        monkeypatch.delitem(seen, address.partition("://")[0], raising=False)
        with refused("not-installed", f"install {package}"):
            load_data(data_entry({"path": address}))

    def test_a_place_to_write_to(self, bucket: str) -> None:
        with refused("unsupported", "on this machine"):
            convert([], Path("s3://bucket/out.jsonl"))


# -- a server ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of a server that speaks S3, on this machine."""
    for package in ("flask", "flask_cors", "s3fs"):
        pytest.importorskip(package)
    server_module = pytest.importorskip("moto.server")
    import fsspec

    for key, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "y"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{key}", value)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    system = fsspec.filesystem("s3", skip_instance_cache=True)
    system.mkdir("bucket")
    for name, content in FILES.items():
        system.pipe(f"bucket/{name}", content)
    yield "s3://bucket"
    server.stop()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_s3(
    tmp_path: Path, s3: str, language_folder: Callable[..., str], vision_folder: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """From a bucket through `data check` and `data show` to two training steps; without credentials in one sentence."""
    made = dock({"type": "hf_vision", "name": vision_folder()}, "mlp", language_folder())
    monkeypatch.setattr("opticnerve.cli.data._processor_of", lambda name, overrides=None: made.processor)
    cached = [f"media_cache={tmp_path / 'media'}"]
    for path, said in READ:
        for options in ([], ["streaming=true"]) if path != "set" else ([],):
            checked = CliRunner().invoke(app, ["data", "check", f"{s3}/{path}", *cached, *options, "--json"])
            assert json.loads(checked.stdout)["good"] == len(said), checked.output
        shown = CliRunner().invoke(app, ["data", "show", f"{s3}/{path}", *cached, "--model", "made", "--json"])
        assert json.loads(shown.stdout)["pieces"], shown.output
    entry = data_entry({"path": f"{s3}/set/d.jsonl", "media_cache": str(tmp_path / "media")})
    stage = Stage(name="s", train={"connector": 1e-2}, data=[entry], batch_size=2, steps=2)
    sampler, objective = StageSampler(load_examples([entry]), stage, made.processor, seed=0), NextToken(made.model)
    for step in range(2):
        loss, count = objective(sampler[step])
        (loss / count).backward()
        assert count > 0 and torch.isfinite(loss)
    for path in ("none.jsonl", "none/*.tar"):
        with refused("missing-file", error=DataError):
            load_data(data_entry({"path": f"{s3}/{path}"}))
    type(cloud.filesystem(s3)[0]).clear_instance_cache()
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(key)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with refused("no-permission", "AWS_ACCESS_KEY_ID"):
        load_data(data_entry({"path": f"{s3}/set/d.jsonl"}))


def test_a_data_set_of_the_hub_by_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`hf://`: the data file, and a picture that it names, from a hub on this machine."""
    kept = tmp_path / "kept"
    put(kept / "1.png", png())
    address = "hf://datasets/me/set"
    put(kept / "d.jsonl", [{"image": f"{address}/1.png", "caption": "red"}, {"image": "1.png", "caption": "blue"}])
    with serving() as hub:
        hub.add("me/set", kept, kind="datasets")
        hub.point_here(monkeypatch, tmp_path / "home")
        monkeypatch.setattr("huggingface_hub.hf_file_system.constants.ENDPOINT", hub.address, raising=False)
        options = {"path": f"{address}/d.jsonl", "media_cache": str(tmp_path / "media")}
        found = load_data(data_entry(options))
        assert answers(found) == ["red", "blue"]
        assert all(Path(str(sample.images[0].source)).read_bytes() == png() for sample in found)
        with pytest.raises(OpticNerveError):
            load_data(data_entry({"path": f"{address}/none.jsonl"}))
