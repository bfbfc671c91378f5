"""Checkpoints are whole or not there."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from opticnerve.train import checkpoint
from opticnerve.types import OpticNerveError


def state(step: int) -> dict[str, Any]:
    return {"x": torch.full((3,), float(step)), "loss": 0.5}


def test_newest_wins_and_old_ones_go(tmp_path: Path) -> None:
    for step in (3, 5, 12):
        checkpoint.save(tmp_path, step, state(step))
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["checkpoint-00000005", "checkpoint-00000012"]
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found["step"] == 12
    assert torch.equal(found["x"], state(12)["x"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-00000005", "checkpoint-00000012"]


def test_saving_the_same_step_twice(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 3, state(1))
    checkpoint.save(tmp_path, 3, state(2))
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert float(found["x"][0]) == 2.0


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "tear",
    [
        lambda p: cut(p / checkpoint.STATE),
        lambda p: flip(p / checkpoint.STATE),
        lambda p: (p / checkpoint.STATE).unlink(),
        lambda p: (p / checkpoint.SUMS).unlink(),
        lambda p: (p / checkpoint.SUMS).write_text("{"),
        lambda p: (p / checkpoint.SUMS).write_text("{}"),
    ],
    ids=["cut", "flipped", "no state", "no sums", "torn sums", "empty sums"],
)
def test_a_torn_one_is_passed_over_loudly(tmp_path: Path, tear: Any) -> None:
    checkpoint.save(tmp_path, 3, state(3))
    tear(checkpoint.save(tmp_path, 5, state(5)))
    said: list[str] = []
    found = checkpoint.newest(tmp_path, warn=said.append)
    assert found is not None
    assert found["step"] == 3
    assert len(said) == 1
    assert "checkpoint-00000005" in said[0]


def test_nothing_there(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    (tmp_path / ".writing-checkpoint-00000007-1").mkdir()
    (tmp_path / "checkpoint-of-mine").mkdir()
    assert checkpoint.newest(tmp_path) is None


def test_a_full_disk_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 3, state(3))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OpticNerveError, match="No space left on device; the one before it is whole"):
        checkpoint.save(tmp_path, 5, state(5))
    monkeypatch.undo()
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found["step"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-00000003"]


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
