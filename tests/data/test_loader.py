"""Batches from worker processes: the same as without them, errors readable, memory flat."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import psutil
import pytest
import torch

from opticnerve.data.collators.next_token import Batch, Collator
from opticnerve.data.encode.loader import Sent, TimedBatches, loader
from opticnerve.data.encode.packing import pack
from opticnerve.data.encode.tokenize import encode
from opticnerve.data.media.transform import Bytes, open_for, pixels
from opticnerve.encoders.base import make_image_processor
from opticnerve.types import Conversation, DataError, Features, ask

pytestmark = pytest.mark.usefixtures("private_cache")


class Rows:
    """Batches of one conversation each."""

    def __init__(self, conversations: list[Conversation], processor: Any) -> None:
        self.conversations, self.processor, self.collate = conversations, processor, Collator(processor)

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> Batch:
        return self.collate([pack([[encode(self.conversations[index], self.processor)]])])


def photos(folder: Path, count: int) -> list[Path]:
    random = np.random.default_rng(0)
    files = [folder / f"{i}.jpg" for i in range(count)]
    for file in files:
        PIL.Image.fromarray(random.integers(0, 256, (150, 200, 3), dtype=np.uint8)).save(file)
    return files


@pytest.fixture
def rows(docked: Callable[..., Any], tmp_path: Path) -> Rows:
    asked = [ask(f"question {i}", file, answer="a") for i, file in enumerate(photos(tmp_path, 6))]
    return Rows([Conversation(c.messages, id=f"sample {i}") for i, c in enumerate(asked)], docked().processor)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_change_nothing(rows: Rows, workers: int) -> None:
    wanted = [rows[i] for i in range(2, 6)]
    got = list(TimedBatches(loader(rows, 2, workers, "cpu"), "cpu"))
    assert [b.ids for b in got] == [b.ids for b in wanted] == [[f"sample {i}"] for i in range(2, 6)]
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert one.media["pixel_values"].dtype == torch.float32
        assert torch.equal(one.media["pixel_values"], other.media["pixel_values"])


def test_pixels_cross_as_bytes(rows: Rows) -> None:
    sent = next(iter(loader(rows, 0, 1, "cpu")))
    assert isinstance(sent, Sent)
    assert isinstance(sent.batch.media["pixel_values"], Bytes)
    assert not rows.collate.compact, "what workers do stays with them"


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_arrives_as_it_was_raised(rows: Rows, workers: int) -> None:
    rows.conversations[3].images[0].source.unlink()
    waiting = TimedBatches(loader(rows, 2, workers, "cpu"))
    assert next(waiting).ids == ["sample 2"]
    with pytest.raises(DataError) as caught:
        next(waiting)
    assert (caught.value.kind, caught.value.where) == ("missing-image", "sample 3")
    assert str(caught.value).startswith("sample 3: ")
    assert "Traceback" not in str(caught.value)
    assert next(waiting).ids == ["sample 4"]


def test_the_training_s_random_numbers_are_left_alone(rows: Rows) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(TimedBatches(loader(rows, 0, 1, "cpu")))
    assert torch.equal(torch.get_rng_state(), before)


class Slow:
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Any]:
        time.sleep(0.05)
        return {"index": index, "threads": torch.get_num_threads()}


def test_it_knows_how_long_it_waited() -> None:
    waiting = TimedBatches(loader(Slow(), 0, 0, "cpu"))
    assert waiting.seconds == 0
    next(waiting)
    first = waiting.seconds
    assert first >= 0.05
    next(waiting)
    assert waiting.seconds >= first + 0.05
    before = waiting.seconds
    time.sleep(0.05)  # the caller's own time does not count
    assert waiting.seconds == before


def test_a_worker_has_one_thread() -> None:
    assert {b["threads"] for b in TimedBatches(loader(Slow(), 0, 2, "cpu"))} == {1}


@dataclass
class Everything:
    features: Features
    media: dict[str, Any] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)


def test_pinning_reaches_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[tuple[int, ...]] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: (pinned.append(tuple(t.shape)), t)[1])
    features = Features(torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool))
    compact = Bytes(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), (0.0,) * 3, (1.0,) * 3)
    sent = Sent(Everything(features, {"pixel_values": compact}, ["a"])).pin_memory()
    assert sorted(pinned) == [(1, 2), (1, 2, 3), (1, 3, 2, 2)]
    assert sent.batch.ids == ["a"]


class Cycle:
    """Many batches from few files."""

    compact = False

    def __init__(self, files: list[Path], batches: int) -> None:
        self.files, self.batches, self.collate = files, batches, self
        self.processor = make_image_processor(size=64, mean=[0.5] * 3, std=[0.5] * 3)

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> dict[str, Any]:
        return pixels(self.processor, [open_for(self.processor, f) for f in self.files], compact=self.compact)


def resident() -> int:
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(p.memory_info().rss for p in processes)


def test_memory_stays_flat(tmp_path: Path) -> None:
    """As many batches again add less than one in ten of them would take, were they kept."""
    waiting, seen = TimedBatches(loader(Cycle(photos(tmp_path, 16), 500), 0, 2, "cpu")), []
    for number in range(481):
        batch = next(waiting)
        if number in (240, 480):
            seen.append(resident())
    assert seen[1] - seen[0] < 24 * batch["pixel_values"].nbytes
