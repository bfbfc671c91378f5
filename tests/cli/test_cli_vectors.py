"""`opticnerve classify`, `embed` and `eval` with a dual encoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from opticnerve.models.dual_encoder.build import dual


@pytest.fixture(scope="module")
def folder(bert_folder: str, vision_folder: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = dual({"type": "hf_vision", "name": vision_folder("siglip_vision_model")}, bert_folder, projection_dim=8)
    kept = tmp_path_factory.mktemp("dual")
    made.save(kept, [])
    return kept


def test_classify(folder: Path, opticnerve: Callable[..., Any], tmp_path: Path) -> None:
    tiny.picture(0).save(tmp_path / "a.png")
    done = opticnerve("classify", folder, "--image", tmp_path / "a.png", "--classes", "a cat, a dog", "--json")
    [entry] = done.json["pictures"]
    assert sum(c["probability"] for c in entry["classes"]) == pytest.approx(1)
    assert entry["classes"][0]["probability"] >= entry["classes"][1]["probability"]
    (tmp_path / "names.txt").write_text("a cat\n\na dog\n")
    said = opticnerve("classify", folder, "-i", tmp_path / "a.png", "--classes", tmp_path / "names.txt").out
    assert said.startswith(entry["classes"][0]["class"])


@pytest.mark.parametrize(
    ("classes", "message"),
    [("", "the list of classes is empty"), ("cat", "is the only class"), ("cat, cat", "named more than once: 'cat'")],
)
def test_classes_that_are_none(
    classes: str, message: str, folder: Path, opticnerve: Callable[..., Any], tmp_path: Path
) -> None:
    tiny.picture(0).save(tmp_path / "a.png")
    failed = opticnerve("classify", folder, "-i", tmp_path / "a.png", "--classes", classes)
    assert message in failed.err


def test_embed_and_eval(folder: Path, opticnerve: Callable[..., Any], tmp_path: Path) -> None:
    captions = tiny.save_captions(tmp_path, 6)
    found = opticnerve("embed", folder, "--data", captions, "--out", tmp_path / "vectors", "--json").json
    images, texts = np.load(found["images"]["vectors"]), np.load(found["texts"]["vectors"])
    assert images.shape == texts.shape == (6, 8)
    assert images.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, rtol=1e-5)
    ids = [json.loads(line) for line in Path(found["texts"]["ids"]).read_text().splitlines()]
    assert ids[0] == {"row": 0, "id": "a red circle"}
    measured = opticnerve("eval", folder, "--data", captions, "--metric", "retrieval", "--json").json
    right = float(((images @ texts.T).argmax(1) == np.arange(6)).mean())
    assert measured["tasks"][0]["image_to_text"]["R@1"]["accuracy"] == pytest.approx(right)
    shown = opticnerve("eval", folder, "--data", captions, "--metric", "retrieval").out
    assert "picture → text" in shown or "→" in shown


def test_other_models_are_named(folder: Path, opticnerve: Callable[..., Any], tmp_path: Path) -> None:
    failed = opticnerve("ask", folder, "what is it?")
    assert "holds no docked language model but a dual model" in failed.err
    failed = opticnerve("embed", tmp_path / "none", "--data", "x.jsonl", "--out", tmp_path / "v")
    assert failed.code == 1
    assert "no such data file" in failed.err
