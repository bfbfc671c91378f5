"""Packed rows and cached features over processes: two give the loss curve and the weights of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_two_processes import run

import tiny

pytestmark = [pytest.mark.usefixtures("private_cache"), pytest.mark.slow]


def save_uneven(folder: Path) -> Path:
    """Captions from one word to twenty."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(24):
        tiny.picture(i).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "caption": "a red circle " * (1 + i * i % 7)}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "captions.jsonl"


def test_two_processes_share_features_and_packed_rows(
    language_folder: Callable[..., str], vision_folder: Callable[..., str], tmp_path: Path
) -> None:
    """Each sees half of the pictures and trains on half of each step's rows, with as many tokens."""

    def recipe(**stage: Any) -> dict[str, Any]:
        given = {
            "name": "align", "train": {"connector": 1e-2}, "batch_size": 4, "epochs": 2,
            "pack": {"tokens": 120, "window": 12}, "data": [{"path": str(save_uneven(tmp_path / "data"))}], **stage,
        }  # fmt: skip
        vision_encoder = {"type": "hf_vision", "name": vision_folder("clip_vision_model")}
        model = {"language": {"name": language_folder("llama")}, "image": {"encoder": vision_encoder}}
        return {"precision": "fp32", "model": model, "stages": [given]}

    one, weights = run(recipe(), tmp_path / "one", 1)
    two, others = run(recipe(cache_features={"budget": "1GB"}), tmp_path / "two", 2)
    assert sum(line["samples"] for line in one) >= 48
    assert [line["samples"] for line in two] == [line["samples"] for line in one]
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-3, atol=2e-5, msg=name)
