"""The benchmark of attention runs, and both sides compute the same."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_both_sides_compute_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    sys.modules.pop("attention", None)
    import attention

    rows = attention.main(["--quick"])
    assert len(rows) == 4
    assert all(row["apart"] < 0.05 and row["ours, both"] > 0 for row in rows)
    assert capsys.readouterr().out.count("| tiny") == 4
