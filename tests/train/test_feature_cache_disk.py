"""The disk that features take: bounded, shared by the vision encoders, and whole whatever kills a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from errors import refused
from opticnerve.features import budget as feature_disk
from opticnerve.features import store as feature_cache
from opticnerve.features.budget import default_budget, evict, folder_bytes, hold
from opticnerve.features.store import FeatureStore
from opticnerve.types import DataError, Features

A, B, C = "a" * 24, "b" * 24, "c" * 24


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two stores of 1,000 bytes, `a` used before `b`, and a folder that is no store."""
    for age, name in enumerate((B, A, "mine")):
        folder = tmp_path / "features" / name
        folder.mkdir(parents=True)
        (folder / "x.safetensors").write_bytes(b"x" * 1000)
        (folder / ".in-use").touch()
        os.utime(folder / ".in-use", (1e9 - age, 1e9 - age))
    return tmp_path / "features"


def there(root: Path) -> set[str]:
    return {f.name for f in root.iterdir()}


def test_the_least_recently_used_goes_first_and_no_more_than_needed(root: Path) -> None:
    evict(root, root / C, 500, 3500)
    assert there(root) == {A, B, "mine"}
    evict(root, root / C, 600, 3500)
    assert there(root) == {B, "mine"}
    evict(root, root / B, 1400, 3500)
    assert there(root) == {B, "mine"}


def test_what_does_not_fit_is_said_with_numbers_and_nothing_is_removed(root: Path) -> None:
    with refused("disk-full", "5 MB", "4 MB"):
        evict(root, root / C, 5_000_000, 4_000_000)
    assert there(root) == {A, B, "mine"}
    # What is no store, and the store itself, never makes room.
    with refused("disk-full", "1 kB are this vision encoder's"):
        evict(root, root / B, 2_000, 2_500)
    assert there(root) == {A, B, "mine"}


def test_a_full_disk_is_foreseen(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_disk, "free_bytes", lambda _: 800)
    evict(root, root / C, 1_700, 10**9)
    assert there(root) == {B, "mine"}
    with refused("disk-full", "0 bytes of disk"):
        evict(root, root / C, 5_000, 10**9)


def test_a_store_in_use_stays(root: Path) -> None:
    held = hold(root / A)
    evict(root, root / C, 500, 3000)
    assert there(root) == {A, "mine"}
    with refused("disk-full", feature_disk.BUDGET):
        evict(root, root / C, 500, 2000)
    assert there(root) == {A, "mine"}
    held.close()
    evict(root, root / C, 500, 2000)
    assert there(root) == {"mine"}


def test_using_a_store_makes_it_the_last_to_go(root: Path) -> None:
    hold(root / A).close()
    evict(root, root / C, 600, 3500)
    assert there(root) == {A, "mine"}


def test_half_written_files_of_the_dead_are_cleared_away_and_those_of_the_living_are_not(root: Path) -> None:
    partial = root / A / ".x-1.partial"
    partial.write_bytes(b"half")
    held = hold(root / A)
    assert not partial.exists()
    partial.write_bytes(b"half")
    hold(root / A).close()
    assert partial.exists()
    held.close()


def test_a_folder_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refused("no-permission", tmp_path / "file" / C, "OPTICNERVE_CACHE"):
        FeatureStore(tmp_path / "file" / C)


def test_the_default_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(feature_disk.BUDGET, raising=False)
    monkeypatch.setattr(feature_disk, "free_bytes", lambda _: 10**12)
    assert default_budget(tmp_path / "none") == 20 * 10**9
    monkeypatch.setattr(feature_disk, "free_bytes", lambda _: 10**10)
    assert default_budget(tmp_path / "none") == 10**9
    monkeypatch.setenv(feature_disk.BUDGET, "3.5GB")
    assert default_budget(tmp_path) == 3_500_000_000
    monkeypatch.setenv(feature_disk.BUDGET, "much")
    with refused("wrong-type", feature_disk.BUDGET, "'much'", "50GB"):
        default_budget(tmp_path)


# -- filling a store with a vision encoder that needs no model ----------------------------------------------------------------


def look(pixel_values: torch.Tensor) -> Features:
    """(B, 3, H, W) → 4 tokens of width 2, other ones for other pictures."""
    tokens_BND = pixel_values.flatten(1)[:, :8].unflatten(1, (4, 2)).float()
    return Features(tokens_BND, torch.ones(tokens_BND.shape[:2], dtype=torch.bool))


def prepare(pictures: list[Any], return_tensors: str) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.stack([torch.tensor(list(p.tobytes())).view(3, *p.size) for p in pictures])}


EACH = 4 * 2 * 4 + 4 + 80  # tokens, mask, digest


@pytest.fixture
def pictures(tmp_path: Path) -> list[tuple[Any, str]]:
    for i in range(7):
        tiny.picture(i, 4).save(tmp_path / f"{i}.png")
    return [(tmp_path / f"{i}.png", f"sample {i}") for i in range(7)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches and shards of two pictures."""
    monkeypatch.setattr(feature_cache, "BATCH", 2)
    monkeypatch.setattr(feature_cache, "SHARD_BYTES", 2 * EACH)


def test_the_budget_bounds_what_a_store_writes(root: Path, pictures: list[tuple[Any, str]]) -> None:
    with refused("disk-full", feature_disk.BUDGET):
        FeatureStore(root / C, budget=2000).fill(pictures, look, prepare)
    assert not list((root / C).glob("*.safetensors"))
    assert there(root) >= {A, B, "mine"}
    allowed = folder_bytes(root) + 500
    FeatureStore(root / C, budget=allowed).fill(pictures, look, prepare)
    assert there(root) == {B, C, "mine", "digests.sqlite"}
    assert folder_bytes(root) <= allowed


@pytest.mark.usefixtures("small")
def test_an_interrupt_keeps_what_is_whole(tmp_path: Path, pictures: list[tuple[Any, str]]) -> None:
    calls = []

    def interrupted(pixel_values: torch.Tensor) -> Features:
        calls.append(len(pixel_values))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return look(pixel_values)

    store = FeatureStore(tmp_path / "features" / C)
    with pytest.raises(KeyboardInterrupt):
        store.fill(pictures, interrupted, prepare)
    del store
    again = FeatureStore(tmp_path / "features" / C)
    assert len(again) == 4
    assert again.fill(pictures, look, prepare) == 3


@pytest.mark.usefixtures("small")
def test_processes_share_the_work_and_each_sees_all_in_the_end(tmp_path: Path, pictures: list[tuple[Any, str]]) -> None:
    folder = tmp_path / "features" / C
    one, two = FeatureStore(folder), FeatureStore(folder)
    first = one.fill(pictures, look, prepare, rank=0, world=2)
    second = two.fill(pictures, look, prepare, rank=1, world=2)
    assert first + second == 7
    assert min(first, second) > 0
    one.refresh()
    sources, where = zip(*pictures, strict=True)
    whole = FeatureStore(tmp_path / "alone" / C)
    whole.fill(pictures, look, prepare)
    assert torch.equal(one.rows(sources, where).tokens_BND, whole.rows(sources, where).tokens_BND)


@pytest.mark.usefixtures("small")
def test_two_that_know_nothing_of_each_other_do_no_harm(tmp_path: Path, pictures: list[tuple[Any, str]]) -> None:
    one, two = FeatureStore(tmp_path / C), FeatureStore(tmp_path / C)
    assert one.fill(pictures, look, prepare) == two.fill(pictures[::-1], look, prepare) == 7
    sources, where = zip(*pictures, strict=True)
    found = [s.rows(sources, where).tokens_BND for s in (one, two, FeatureStore(tmp_path / C))]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.usefixtures("small")
def test_few_files_are_open_at_a_time(tmp_path: Path, pictures: list[tuple[Any, str]]) -> None:
    store = FeatureStore(tmp_path / C)
    store.fill(pictures, look, prepare)
    store._reader.most_open = 2
    sources, where = zip(*pictures, strict=True)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    expected = torch.cat([store.rows([s], [w]).tokens_BND for s, w in pictures])
    assert torch.equal(store.rows(sources, where).tokens_BND, expected)
    assert len(store._reader._files) == 2
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_half_the_disk_in_bfloat16(tmp_path: Path, pictures: list[tuple[Any, str]]) -> None:
    exact, half = FeatureStore(tmp_path / A), FeatureStore(tmp_path / B, stored=torch.bfloat16, dtype=torch.float32)
    for store in (exact, half):
        store.fill(pictures, lambda p: Features(look(p).tokens_BND / 7, look(p).mask_BN), prepare)
    sources, where = zip(*pictures, strict=True)
    wanted = exact.rows(sources, where).tokens_BND
    found = half.rows(sources, where).tokens_BND
    assert found.dtype == torch.float32
    assert not torch.equal(found, wanted)
    torch.testing.assert_close(found, wanted.bfloat16().float(), rtol=0, atol=0)
    sizes = [sum(f.stat().st_size for f in s.folder.glob("*.safetensors")) for s in (exact, half)]
    assert sizes[0] - sizes[1] == pytest.approx(7 * 16, abs=16)


@pytest.mark.usefixtures("small")
def test_pictures_that_cannot_be_opened_are_left_out_where_that_is_asked(
    tmp_path: Path, pictures: list[tuple[Any, str]]
) -> None:
    (tmp_path / "2.png").write_bytes(b"no picture")
    (tmp_path / "3.png").unlink()
    told: list[str] = []
    store = FeatureStore(tmp_path / C)
    with refused("missing-image", "sample 3", "3.png", error=DataError):
        store.fill(pictures, look, prepare)
    store.fill(pictures, look, prepare, on_error=lambda e: told.append(e.where))
    assert sorted(told) == ["sample 2", "sample 3"]
    assert len(store) == 5
    with refused("unreadable-image", "sample 2", error=DataError):
        store.check(*pictures[2])


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_feature_cache_disk as t
from opticnerve.features import shards
real, written = shards.save_file, []
def half(tensors, path, metadata):
    real(tensors, path, metadata)
    written.append(path)
    if len(written) == 2:
        os.truncate(path, 300)
        os.kill(os.getpid(), signal.SIGKILL)
shards.save_file = half
t.feature_cache.BATCH, t.feature_cache.SHARD_BYTES = 2, 2 * t.EACH
folder = Path(sys.argv[2])
t.FeatureStore(folder / "features" / t.C).fill([(folder / f"{i}.png", str(i)) for i in range(7)], t.look, t.prepare)
"""


@pytest.mark.slow
def test_a_kill_in_mid_write_leaves_whole_shards(tmp_path: Path, pictures: list[tuple[Any, str]]) -> None:
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-c", KILLED, str(here), str(tmp_path)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    folder = tmp_path / "features" / C
    assert len(list(folder.glob(".*.partial"))) == 1
    store = FeatureStore(folder)
    assert not list(folder.glob(".*.partial"))
    assert len(store) == 2
    assert store.fill(pictures, look, prepare) == 5
    assert len(FeatureStore(folder)) == 7


def test_progress_is_told(tmp_path: Path, pictures: list[tuple[Any, str]], capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    with feature_cache.Counter(7, Console(), every_s=0.0) as counter:
        FeatureStore(tmp_path / C).fill(pictures, look, prepare, progress=counter.update)
    assert "pictures: 7/7 seen" in capsys.readouterr().out
