"""benchmarks/train.py in its quick form: all sides train, and begin from the same loss and gradient."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import in_process
import pytest
import torch
from accelerate.state import AcceleratorState

from opticnerve.train import loop, setup


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The script; what a trial replaces for good is put back."""
    module = in_process.script("train", monkeypatch)
    monkeypatch.setattr(module.shapes, "matmul_rate", partial(module.shapes.matmul_rate, seconds=0.01))
    monkeypatch.setenv("OPTICNERVE_CACHE", str(tmp_path))
    for replaced, name in ((loop, "image_use"), (setup, "fuse_layers")):
        monkeypatch.setattr(replaced, name, getattr(replaced, name))
    yield module
    AcceleratorState._reset_state(reset_partial_state=True)  # the peers' Trainer makes one


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the peers'
@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_both_sides_train_the_same(
    stage: str, train: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_process.run(train, monkeypatch, "--quick", "--rounds", "1", "--stage", stage)
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("| opticnerve |"))
    assert float(re.findall(r"within ([\d.e-]+)", row)[0]) < 1e-2  # bf16
    assert "Of the floor" in printed


def test_what_stands_in_for_the_fused_layers_takes_what_they_take(train: Any) -> None:
    taken = list(inspect.signature(setup.fuse_layers).parameters)
    train._without(["ablate=layers"])
    assert list(inspect.signature(setup.fuse_layers).parameters) == taken
    with setup.fuse_layers(torch.nn.Module(), None, required=False):
        pass
