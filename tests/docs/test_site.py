"""The documents build as a site, and nothing in it is loose."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},  # a word on mkdocs' own future
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    data = (tmp_path / "site" / "data" / "index.html").read_text(encoding="utf-8")
    assert "captions.jsonl" in data
    assert "../recipes/" not in (tmp_path / "site" / "recipes" / "index.html").read_text(encoding="utf-8")
