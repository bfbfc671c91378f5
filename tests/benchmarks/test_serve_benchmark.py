"""The benchmark of the server runs, and both sides say the same."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from opticnerve.models.vlm.build import Dock

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_both_sides_say_the_same(
    monkeypatch: pytest.MonkeyPatch, docked: Callable[..., Dock], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    sys.modules.pop("serve", None)
    import serve

    made = docked()
    monkeypatch.setattr(serve, "load_model", lambda name, **_: (made.model.eval(), made.processor))
    rows = serve.main(["--quick"])
    assert [row["same"] for row in rows] == ["8/8", "8/8"]
    assert all(row["requests/s"] > 0 for row in rows)
    assert "times the requests a second" in capsys.readouterr().out
