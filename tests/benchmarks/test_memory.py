"""The table of memory in docs/choose.md is what `plan` counts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_a_row_of_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("memory", "shapes"):
        sys.modules.pop(name, None)
    import memory

    [row] = memory.main(["0.5B", "QLoRA"])
    page = (ROOT / "docs" / "choose.md").read_text(encoding="utf-8")
    assert row in page.splitlines()
    assert row in capsys.readouterr().out
    assert page.count("\n| 13B |") == 4
    assert memory.card(10 * 2**30) == "12 GB"
    assert memory.card(80 * 2**30) == "several of 80 GB"
