"""The benchmark of quantised weights runs, and says what `plan` counts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_layers_in_fewer_bits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    sys.modules.pop("quantized", None)
    import quantized

    found = quantized.main(["--quick"])
    shares = {kind: sizes["layers"] / found["bf16"]["layers"] for kind, sizes in found.items()}
    assert 0.25 < shares["nf4"] < 0.3
    assert 0.5 < shares["int8"] < 0.52
    assert found["nf4"]["all"] < found["int8"]["all"] < found["bf16"]["all"]
    assert "| nf4 |" in capsys.readouterr().out
