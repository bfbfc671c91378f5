"""What a saved folder says of itself to people, and to a hub."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers.utils.hub import PushToHubMixin

from hub import TOKEN, serving
from opticnerve.models.checkpoint import strict
from opticnerve.models.dual_encoder.build import dual
from opticnerve.models.vlm.build import Dock, merge

pytestmark = pytest.mark.usefixtures("private_cache")
Make = Callable[..., Dock]


def lines(folder: Path) -> str:
    """The page's Python."""
    text = (folder / "README.md").read_text()
    assert "pip install opticnerve" in text
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]


def test_saved_and_merged_folders_and_runs(docked: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = docked()
    made.model.save_pretrained(tmp_path / "saved")
    made.save(tmp_path / "run", [])
    merge(tmp_path / "run", tmp_path / "merged")
    made.processor.save_pretrained(tmp_path / "saved")
    for name in ("saved", "run", "merged"):
        data = ModelCard.load(tmp_path / name / "README.md").data
        assert (data.library_name, data.pipeline_tag, data.tags) == ("opticnerve", "image-text-to-text", ["opticnerve"])
        found: dict[str, Any] = {}
        monkeypatch.chdir(tmp_path / name)
        exec(lines(tmp_path / name), found)
        assert isinstance(found["model"], type(made.model))
        assert isinstance(found["processor"], type(made.processor))


def test_one_that_is_there_stays(docked: Make, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    made = docked()
    made.model.save_pretrained(tmp_path)
    made.save(tmp_path, [])
    assert (tmp_path / "README.md").read_text() == "mine"


def test_other_families_have_their_own(bert_folder: str, vision_folder: Callable[..., str], tmp_path: Path) -> None:
    made = dual({"type": "hf_vision", "name": vision_folder()}, bert_folder, projection_dim=16)
    made.model.save_pretrained(tmp_path)
    assert "DualEncoder.from_pretrained" in lines(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.pipeline_tag == "zero-shot-image-classification"


def test_pushed(docked: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers writes a page of its own where it finds none."""
    made = docked()
    with serving() as hub:
        hub.uploads = tmp_path / "uploads"
        hub.point_here(monkeypatch, tmp_path / "home")
        monkeypatch.setattr(
            "transformers.utils.hub._hf_api", None, raising=False
        )  # it remembers the hub it was made for
        for name, own in (("me/dock", None), ("me/other", "---\nlicense: mit\n---\nmine\n")):
            page = hub.uploads / name / "README.md"
            if own is not None:
                page.parent.mkdir(parents=True)
                page.write_text(own)
            made.model.push_to_hub(name, token=TOKEN)
            assert ("mine" in page.read_text()) == (own is not None)
            assert ("library_name: opticnerve" in page.read_text()) == (own is None)
            assert (page.parent / "model.safetensors").is_file()


def test_a_branch_or_a_pull_request_leaves_main_alone(docked: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = docked(), []
    monkeypatch.setattr(PushToHubMixin, "push_to_hub", lambda self, name, **given: asked.append(given))
    monkeypatch.setattr(strict, "introduce_on_hub", lambda *_, **__: pytest.fail("a page for the main branch"))
    for given in ({"create_pr": True}, {"revision": "mine"}):
        made.model.push_to_hub("me/dock", **given)
        assert asked[-1] == given


def test_transformers_alone_names_the_package(docked: Make, tmp_path: Path) -> None:
    """All that it says of an architecture that it does not know is the name: ours is the package's."""
    docked().model.save_pretrained(tmp_path)
    code = f"import transformers; transformers.AutoConfig.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "`opticnerve`" in done.stderr
