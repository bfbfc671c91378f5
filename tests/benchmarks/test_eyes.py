"""The benchmark of vision encoders runs, and both sides see the same."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_both_sides_see_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    sys.modules.pop("eyes", None)
    import eyes

    rows = eyes.main(["--quick"])
    assert [row["apart"] < 0.02 for row in rows] == [True, True]
    assert all(row[f"ours, {kind}"] > 0 for row in rows for kind in ("frozen", "open"))
    assert capsys.readouterr().out.count("| tiny ") == 2
