"""benchmarks/data.py with a few small JPEGs: it runs, and both sides give the same pixels."""

from __future__ import annotations

import in_process
import pytest


@pytest.mark.slow
def test_quick_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    in_process.run(in_process.script("data", monkeypatch), monkeypatch, "--quick")
    printed = capsys.readouterr().out
    assert "| opticnerve |" in printed
    assert "transformers: at most 0 in normalised units" in printed  # too small to be decoded smaller
