"""Parked weights are the same weights, in nobody's memory, and train as before."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from opticnerve.ops import enabled
from opticnerve.ops.offload import offload, offload_encoder

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="files are mapped and removed on POSIX systems alone"),
    pytest.mark.skipif(not enabled(), reason="OPTICNERVE_PLAIN switches it off"),
]


class Eye(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 5), nn.Linear(5, 7).bfloat16(), nn.Linear(7, 2)
        self.tied = nn.Parameter(self.first.weight.data)
        self.turned = nn.Parameter(torch.randn(3, 4).t(), requires_grad=False)
        self.requires_grad_(False)
        self.head.requires_grad_(True)


def test_the_same_bits_and_nothing_left_in_the_folder(tmp_path: Path) -> None:
    vision_encoder = Eye()
    before = {n: p.clone() for n, p in vision_encoder.named_parameters()}
    own = {n: p.data_ptr() for n, p in vision_encoder.named_parameters()}
    assert offload([vision_encoder], tmp_path) >= sum(
        before[n].nbytes for n in ("first.weight", "second.weight", "second.bias")
    )
    assert list(tmp_path.iterdir()) == []
    for name, p in vision_encoder.named_parameters():
        assert torch.equal(p, before[name])
        assert p.shape == before[name].shape
        stays = name.startswith("head") or name == "turned"  # it trains; it does not lie in one piece
        assert (p.data_ptr() == own[name]) == stays, name
    assert vision_encoder.tied.data_ptr() == vision_encoder.first.weight.data_ptr()


def test_who_trains_them_later_changes_them_alone(tmp_path: Path) -> None:
    one, other = Eye(), Eye()
    other.load_state_dict(one.state_dict())
    offload([one], tmp_path)
    for vision_encoder in (one, other):
        vision_encoder.requires_grad_(True)
        optimizer = torch.optim.SGD(vision_encoder.parameters(), lr=0.1)
        vision_encoder.first(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_they_leave_the_memory(tmp_path: Path) -> None:
    size = 256 << 20
    vision_encoder = nn.Linear(1 << 10, size // 4 >> 10, bias=False).requires_grad_(False)
    full = psutil.Process().memory_info().rss
    assert offload([vision_encoder], tmp_path) == size
    empty = psutil.Process().memory_info().rss
    assert full - empty > 0.8 * size


def test_nothing_to_park(tmp_path: Path) -> None:
    assert offload([nn.Linear(2, 2)], tmp_path) == 0
    assert offload([], tmp_path) == 0
    assert offload([nn.Linear(2, 2, device="meta").requires_grad_(False)], tmp_path) == 0


def test_a_disk_that_cannot_be_written_leaves_them_where_they_are(tmp_path: Path) -> None:
    vision_encoder, said = Eye(), []
    own = [p.data_ptr() for p in vision_encoder.parameters()]

    class Console:
        def print(self, text: str, **_: Any) -> None:
            said.append(text)

    offload_encoder(vision_encoder, tmp_path / "absent", Console())
    assert said == ["the vision encoder's weights stay in memory: No such file or directory"]
    assert [p.data_ptr() for p in vision_encoder.parameters()] == own
