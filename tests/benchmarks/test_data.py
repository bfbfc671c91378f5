"""benchmarks/data.py with a few small JPEGs: it runs, and both sides give the same pixels."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "data.py"


@pytest.mark.slow
def test_quick_run() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--quick"], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| opticnerve |" in done.stdout
    assert "transformers: at most 0 in normalised units" in done.stdout  # too small to be decoded smaller
