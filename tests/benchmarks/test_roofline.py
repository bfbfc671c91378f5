"""benchmarks/roofline.py with tiny shapes: what it foresees of all layers is what all layers run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import gpu
import roofline


@pytest.mark.parametrize("side", gpu.SIDES)
def test_all_layers_from_one_and_two(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    title, work = gpu.ROWS["lora"]
    monkeypatch.setitem(gpu.ROWS, "lora", (title, gpu.quick(work)))
    foreseen = roofline.predict("lora", side)
    totals, peak, kernels, _ = roofline.counted("lora", side, 2, 3)  # all of the tiny shape's
    assert sum(t[1] for t in foreseen.totals.values()) == len(kernels)
    assert foreseen.peak == pytest.approx(peak, rel=0.1)
    assert totals["products"][0] == pytest.approx(foreseen.totals["products"][0])
    assert sum(k.flops for k in kernels) >= foreseen.needs / 2, "the counted kernels do the row's work"
    assert "not yet run" in roofline.table([foreseen])
