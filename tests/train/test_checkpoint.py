"""Checkpoints are whole or not there."""

from __future__ import annotations

import errno
import json
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from errors import refused
from opticnerve.common import atomic
from opticnerve.train import checkpoint


def state(step: int) -> dict[str, Any]:
    return {"x": torch.full((3,), float(step)), "loss": 0.5}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def newest_step(folder: Path, **options: Any) -> int:
    found = checkpoint.newest(folder, **{"warn": lambda text: None, **options})
    assert found is not None
    return int(found["step"])


def test_newest_wins_and_old_ones_go(tmp_path: Path) -> None:
    for step in (3, 5, 12):
        checkpoint.save(tmp_path, step, state(step))
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found["step"] == 12
    assert torch.equal(found["x"], state(12)["x"])
    assert names(tmp_path) == ["checkpoint-00000005", "checkpoint-00000012"]
    checkpoint.save(tmp_path, 15, state(15), keep=1)
    assert names(tmp_path) == ["checkpoint-00000015"]


def test_saving_the_same_step_again_leaves_no_moment_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, 3, state(1))
    rename = Path.rename

    def watched(self: Path, target: Path) -> Path:
        assert newest_step(tmp_path) == 3
        moved = rename(self, target)
        assert newest_step(tmp_path) == 3
        return moved

    monkeypatch.setattr(Path, "rename", watched)
    for value in (2, 4):
        checkpoint.save(tmp_path, 3, state(value), keep=1)
        found = checkpoint.newest(tmp_path)
        assert found is not None
        assert float(found["x"][0]) == value
        assert len(checkpoint.checkpoints(tmp_path)) == 1


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


def rewrite(path: Path, content: bytes) -> None:
    """Another state under a hash that fits it: what torch.load meets is whatever was written."""
    (path / checkpoint.STATE).write_bytes(content)
    sums = {checkpoint.STATE: {"sha256": atomic.sha256(path / checkpoint.STATE), "bytes": len(content)}}
    (path / checkpoint.SUMS).write_text(json.dumps(sums))


def pickled(path: Path, value: Any) -> None:
    torch.save(value, path / "other")
    rewrite(path, (path / "other").read_bytes())


class Stranger:
    """What weights_only refuses."""


TORN: dict[str, Callable[[Path], Any]] = {
    "cut": lambda p: cut(p / checkpoint.STATE),
    "flipped": lambda p: flip(p / checkpoint.STATE),
    "no state": lambda p: (p / checkpoint.STATE).unlink(),
    "no sums": lambda p: (p / checkpoint.SUMS).unlink(),
    "torn sums": lambda p: (p / checkpoint.SUMS).write_text("{"),
    "empty sums": lambda p: (p / checkpoint.SUMS).write_text("{}"),
    "sums that are a list": lambda p: (p / checkpoint.SUMS).write_text("[1]"),
    "sums of a list": lambda p: (p / checkpoint.SUMS).write_text('{"state.pt": []}'),
    "sums without end": lambda p: (p / checkpoint.SUMS).write_text("[" * 100_000),
    "sums in no encoding": lambda p: (p / checkpoint.SUMS).write_bytes(b"\xff\xfe{}"),
    "a cut archive that fits its hash": lambda p: rewrite(p, (p / checkpoint.STATE).read_bytes()[:400]),
    "nothing that fits its hash": lambda p: rewrite(p, b""),
    "text that fits its hash": lambda p: rewrite(p, b"hello, world\n" * 50),
    "a stranger's class": lambda p: pickled(p, {"step": 5, "x": Stranger()}),
    "no mapping": lambda p: pickled(p, [5]),
    "another step": lambda p: pickled(p, {"step": 4}),
}


@pytest.mark.parametrize("tear", TORN.values(), ids=TORN)
def test_a_torn_one_is_passed_over_loudly(tmp_path: Path, tear: Any) -> None:
    checkpoint.save(tmp_path, 3, state(3))
    tear(checkpoint.save(tmp_path, 5, state(5)))
    said: list[str] = []
    assert newest_step(tmp_path, warn=said.append) == 3
    assert len(said) == 1
    assert "checkpoint-00000005" in said[0]


def test_any_damage_to_the_archive_is_torn(tmp_path: Path) -> None:
    """Bytes changed at random, under hashes that fit: whatever torch makes of them, no exception of its own comes out."""
    path = checkpoint.save(tmp_path, 5, {**state(5), "rng": checkpoint.rng_state()})
    whole, rng = (path / checkpoint.STATE).read_bytes(), random.Random(0)
    for _ in range(300):
        data = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.3 else whole)
        for _ in range(rng.choice((1, 4, 40))):
            if data:
                data[rng.randrange(min(len(data), 3000))] = rng.randrange(256)
        rewrite(path, bytes(data))
        try:
            checkpoint.load(path)
        except ValueError as e:
            assert checkpoint.STATE in str(e)


def test_where_none_is_whole_nothing_begins_in_silence(tmp_path: Path) -> None:
    for step in (3, 5):
        cut(checkpoint.save(tmp_path, step, state(step)) / checkpoint.STATE)
    with refused("damaged", tmp_path, "checkpoint-00000005"):
        checkpoint.newest(tmp_path, warn=lambda text: None)


def test_torn_ones_do_not_count_among_those_kept(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 3, state(3))
    cut(checkpoint.save(tmp_path, 5, state(5)) / checkpoint.STATE)
    checkpoint.save(tmp_path, 4, state(4))
    assert names(tmp_path) == ["checkpoint-00000003", "checkpoint-00000004"]


def test_one_ahead_of_its_metrics_is_passed_over(tmp_path: Path) -> None:
    for step in (3, 5):
        checkpoint.save(tmp_path, step, state(step))
    assert newest_step(tmp_path, most=4) == 3
    with refused("damaged", "metrics.jsonl", "step 2"):
        checkpoint.newest(tmp_path, warn=lambda text: None, most=2)


def test_nothing_there(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    (tmp_path / ".writing-checkpoint-00000007-here-1").mkdir()
    (tmp_path / "checkpoint-of-mine").mkdir()
    assert checkpoint.newest(tmp_path) is None


def test_what_dead_processes_left_goes_away(tmp_path: Path) -> None:
    dead = 2**22 - 3  # above the highest process id there may be by default
    mine = atomic.partial_of(tmp_path / "checkpoint-00000007")
    for name in (mine.name, f"{mine.name.rpartition('-')[0]}-{dead}", ".writing-checkpoint-00000007-elsewhere-7"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.pt").write_bytes(b"half")
    (tmp_path / f"{mine.name.rpartition('-')[0]}-{dead}.file").write_bytes(b"not of ours")
    checkpoint.save(tmp_path, 9, state(9))
    assert [n for n in names(tmp_path) if n.endswith(str(dead))] == []
    assert mine.is_dir()
    assert (tmp_path / ".writing-checkpoint-00000007-elsewhere-7").is_dir()  # that process may live


class TestFullDisk:
    """The one before is whole, and the message says how much was missing."""

    @pytest.fixture(autouse=True)
    def one_before(self, tmp_path: Path) -> Iterator[None]:
        checkpoint.save(tmp_path, 3, state(3))
        yield
        assert newest_step(tmp_path) == 3
        assert names(tmp_path) == ["checkpoint-00000003"]

    def test_told_before_writing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1_500_000})())
        with refused("disk-full", "4 MB", "1.5 MB", tmp_path, "2.5 MB", error=atomic.DiskFull):
            checkpoint.save(tmp_path, 5, {"x": torch.zeros(1_000_000)})

    def test_found_while_writing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.os, "fsync", full)
            with refused("disk-full", "No space left on device", "checkpoint-00000003", error=atomic.DiskFull):
                checkpoint.save(tmp_path, 5, state(5))

    def test_no_file_may_be_so_large(self, tmp_path: Path) -> None:
        """A limit of the system, which stops the writing for real."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, before[1]))
        try:
            with refused("disk-full", "File too large", "checkpoint-00000003", error=atomic.DiskFull):
                checkpoint.save(tmp_path, 5, {"x": torch.zeros(1_000_000)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def test_not_allowed_is_another_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def denied(*_: Any) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.os, "fsync", denied)
            with refused("no-permission", "Permission denied", "checkpoint-00000003") as raised:
                checkpoint.save(tmp_path, 5, state(5))
        assert not isinstance(raised.value, atomic.DiskFull)


def test_generators_go_on(tmp_path: Path) -> None:
    torch.manual_seed(5)
    random.seed(5)
    torch.rand(3), random.random(), random.gauss(0, 1)
    checkpoint.save(tmp_path, 1, {"rng": checkpoint.rng_state()})
    wanted = torch.rand(4), random.random(), random.gauss(0, 1)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    torch.manual_seed(0)
    random.seed(0)
    checkpoint.set_rng_state(found["rng"])
    assert torch.equal(torch.rand(4), wanted[0])
    assert (random.random(), random.gauss(0, 1)) == wanted[1:]
