"""The bounded form of the torture test; its long form: `python tests/torture/torture.py --kills 50`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_four_kills_change_nothing() -> None:
    """In a process of its own: each life of the run is forked from one that has computed nothing."""
    script = Path(__file__).with_name("torture.py")
    ran = subprocess.run([sys.executable, str(script), "--kills", "4"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "4 kills in" in ran.stdout
    for place in ("in mid-cache-write", "in mid-checkpoint", "at a random moment"):
        assert place in ran.stdout
