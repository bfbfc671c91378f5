"""benchmarks/train.py in its quick form: all sides train, and begin from the same loss and gradient."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_both_sides_train_the_same(stage: str) -> None:
    command = [sys.executable, "benchmarks/train.py", "--quick", "--rounds", "1", "--stage", stage]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    row = next(line for line in done.stdout.splitlines() if line.startswith("| opticnerve |"))
    assert float(re.findall(r"within ([\d.e-]+)", row)[0]) < 1e-2  # bf16
    assert "Of the floor" in done.stdout


def test_what_stands_in_for_the_fused_layers_takes_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from opticnerve.train import setup

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    sys.modules.pop("train", None)
    import train

    taken = list(inspect.signature(setup.fuse_layers).parameters)
    monkeypatch.setattr(setup, "fuse_layers", setup.fuse_layers)  # to be put back
    train._without(["ablate=layers"])
    assert list(inspect.signature(setup.fuse_layers).parameters) == taken
    with setup.fuse_layers(torch.nn.Module(), None):
        pass
