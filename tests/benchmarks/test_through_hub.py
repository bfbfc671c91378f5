"""The ready recipe goes through a hub, with tiny shapes in place of the full ones."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.slow
def test_the_quick_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import through_hub

    rows = through_hub.main(["--quick"])
    assert [r["command"] for r in rows] == ["plan", "train", "ask"]
    # A plan fetches no weights, training both, and nothing is fetched twice.
    assert [r["weights"] for r in rows] == [0, 2, 0]
