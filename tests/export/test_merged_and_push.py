"""`merged`, and `push`: the card beside the weights, in a folder or on a (pretended) hub."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from errors import refused
from opticnerve.export import formats, publish
from opticnerve.export.export import export
from opticnerve.inference.load import load_model

pytestmark = pytest.mark.usefixtures("private_cache", "in_this_process")
Make = Callable[..., Path]


def test_merged_stands_alone_and_a_gated_adapter_goes_along(saved: Make, tmp_path: Path) -> None:
    added = export(saved("llama", "dinov2", lora={"rank": 4}), "merged", tmp_path / "added")
    kept = export(saved("llama", "dinov2", lora={"rank": 4, "when": "media"}), "merged", tmp_path / "kept")
    assert added.proof is not None
    assert kept.proof is not None
    assert max(added.proof.difference, kept.proof.difference) < 1e-6
    assert load_model(tmp_path / "added", device="cpu")[0].config.lora is None
    assert load_model(tmp_path / "kept", device="cpu")[0].config.lora["when"] == "media"
    assert "goes along as it is" in kept.notes[0]


def test_merged_is_gated_by_parity_too(saved: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = formats.Merged.write

    def dented(self: Any, model: Any, processor: Any, folder: Path) -> list[str]:
        model.image.connector.layers[0].weight.data.mul_(1.01)
        notes = honest(self, model, processor, folder)
        model.image.connector.layers[0].weight.data.div_(1.01)
        return notes

    monkeypatch.setattr(formats.Merged, "write", dented)
    with refused("mismatch", "logits"):
        export(saved("llama", "siglip_vision_model"), "merged", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def run(saved: Make, tmp_path: Path) -> Path:
    """A run's folder with one finished stage."""
    folder = tmp_path / "run"
    shutil.copytree(saved("llama", "siglip_vision_model"), folder / "stages/1-align")
    (folder / "recipe.yaml").write_text("name: photos\n")
    return folder


def test_push_into_a_folder_brings_the_run_s_card(run: Path, tmp_path: Path) -> None:
    done = publish.push(
        str(run), "me/photos", to_folder=tmp_path / "hub", licence="apache-2.0", datasets=["me/pictures"]
    )  # fmt: skip
    folder = tmp_path / "hub/photos"
    assert done.place == str(folder)
    assert (folder / "model.safetensors").is_file()
    front, body = publish.split((folder / "README.md").read_text())
    assert front["license"] == "apache-2.0"
    assert front["datasets"] == ["me/pictures"]
    assert front["library_name"] == "opticnerve"
    assert front["pipeline_tag"] == "image-text-to-text"
    assert "opticnerve" in front["tags"]
    assert "## How these files were checked" in body
    assert "answered 5 prompts" in body
    with refused("exists-already", tmp_path / "hub"):
        publish.push(str(run), "me/photos", to_folder=tmp_path / "hub")


class Hub:
    """What `push` asks of `huggingface_hub.HfApi`."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.files: set[str] = set()

    def create_repo(self, **given: Any) -> None:
        self.asked.append(("create_repo", given))

    def upload_folder(self, **given: Any) -> str:
        self.asked.append(("upload_folder", given))
        self.files = {f.name for f in Path(given["folder_path"]).iterdir()}
        return f"https://hub.example/{given['repo_id']}"


def test_push_to_a_hub_uploads_weights_and_card_and_keeps_nothing(saved: Make, tmp_path: Path) -> None:
    hub = Hub()
    done = publish.push(
        str(saved("llama", "siglip_vision_model", layer=-2)), "me/it", to="hf-llava", private=True, api=hub
    )
    assert done.place == "https://hub.example/me/it"
    assert [name for name, _ in hub.asked] == ["create_repo", "upload_folder"]
    assert hub.asked[0][1] == {"repo_id": "me/it", "private": True, "exist_ok": True}
    assert {"README.md", "model.safetensors", "config.json", "processor_config.json"} <= hub.files
    assert not Path(hub.asked[1][1]["folder_path"]).exists()


def test_a_name_that_no_hub_takes_is_refused_before_anything_is_read() -> None:
    with refused("wrong-type", "'me/it/too'"):
        publish.push("anything", "me/it/too")


def test_a_card_s_front_matter_is_yaml() -> None:
    front, body = publish.split("---\nlicense: mit\n---\n\n# It\n")
    assert front == yaml.safe_load("license: mit")
    assert body.strip() == "# It"
    assert publish.split("# It\n") == ({}, "# It\n")
