"""Small data and recipes for the command line, and a way to run it in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import yaml

from opticnerve.cli.guard import show_tracebacks
from opticnerve.cli.main import main


@dataclass
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def opticnerve(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Run `opticnerve …` here; wide, so that no message is wrapped."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str | Path) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(w) for w in words])
        show_tracebacks(False)
        captured = capsys.readouterr()
        return Ran(int(left.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    """Four captioned pictures."""
    folder = tmp_path / "data"
    folder.mkdir()
    lines = []
    for i, colour in enumerate(("red", "green", "blue", "white")):
        PIL.Image.new("RGB", (40, 30), colour).save(folder / f"{colour}.png")
        lines.append(json.dumps({"id": f"sample-{i}", "image": f"{colour}.png", "caption": f"a {colour} picture"}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "captions.jsonl"


@pytest.fixture
def recipe_file(
    tmp_path: Path,
    captions: Path,
    language_folder: Callable[..., str],
    vision_folder: Callable[..., str],
    private_cache: Path,
) -> Path:
    """A recipe of tiny parts on the four pictures."""
    path = tmp_path / "recipe.yaml"
    recipe = {
        "name": "tiny",
        "precision": "fp32",
        "forgetting": False,
        "model": {
            "language": {"name": language_folder()},
            "image": {"encoder": {"type": "hf_vision", "name": vision_folder()}},
        },
        "stages": [
            {
                "name": "align",
                "train": {"connector": 1e-3},
                "data": [{"path": str(captions)}],
                "steps": 1,
                "batch_size": 2,
            }
        ],
        "evaluate": [],
    }
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path
