"""Invariant 3 over processes: two give the loss curve and the weights of one, also where one of them has no picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds

import tiny
from opticnerve import recipe as recipes

pytestmark = [pytest.mark.usefixtures("private_cache"), pytest.mark.slow]


def save_mixed(folder: Path) -> Path:
    """Text alone, except for every fifth sample: most of a process's batches hold no picture."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(10):
        content: list[dict[str, Any]] = [{"type": "text", "text": f"what is {i}?"}]
        if i % 5 == 0:
            tiny.picture(i).save(folder / f"{i}.png")
            content.insert(0, {"type": "image", "path": f"{i}.png"})
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": ["yes", "no", "three foxes"][i % 3]}]},
        ]
        lines.append(json.dumps({"messages": messages}))
    (folder / "mixed.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "mixed.jsonl"


def run(recipe: Any, folder: Path, processes: int) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    out = worlds.trained(processes, recipe, folder)
    return worlds.curve(out), worlds.weights(out)


@pytest.mark.parametrize("fusion", ["splice", "cross_attention"])
def test_two_processes_are_one(
    fusion: str, language_folder: Callable[..., str], vision_folder: Callable[..., str], tmp_path: Path
) -> None:
    train = {"connector": 1e-2, "language.lora": 1e-2} | ({"fusion": 1e-2} if fusion == "cross_attention" else {})
    recipe = {
        "precision": "fp32",
        "model": {
            "language": {"name": language_folder("llama")},
            "image": {
                "encoder": {"type": "hf_vision", "name": vision_folder("clip_vision_model")},
                "fusion": {"type": fusion},
            },
        },
        "stages": [
            {
                "name": "align", "train": train, "batch_size": 4, "accumulate": 2, "steps": 6,
                "data": [{"path": str(save_mixed(tmp_path / "data"))}],
            }
        ],
    }  # fmt: skip
    recipes.load(recipe)
    one, weights = run(recipe, tmp_path / "one", 1)
    two, others = run(recipe, tmp_path / "two", 2)
    assert [line["samples"] for line in two] == [line["samples"] for line in one]
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        off = ~torch.isclose(others[name], tensor, rtol=1e-3, atol=2e-5)
        # Adam divides a gradient by its own size: where that is rounding alone, so is the step. A single weight of
        # thousands may meet that (behind a gate that opens from zero), never a share of them.
        assert int(off.sum()) <= off.numel() // 2000, name
        torch.testing.assert_close(others[name], tensor, rtol=0.0, atol=1e-3, msg=name)


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_two_processes_are_one_in_contrastive_learning(
    loss: str, bert_folder: str, vision_folder: Callable[..., str], tmp_path: Path
) -> None:
    """The whole loop: negatives of all processes, two micro-batches on each, both towers open."""
    recipe = {
        "precision": "fp32",
        "model": {
            "image": {"encoder": {"type": "hf_vision", "name": vision_folder("siglip_vision_model")}},
            "text": {"encoder": {"name": bert_folder}}, "projection_dim": 8, "loss": loss,
        },
        "stages": [
            {
                "name": "align", "objective": {"type": "contrastive", "duplicates": "mask"}, "batch_size": 8,
                "train": dict.fromkeys(("image.encoder", "image.projection", "text.projection", "temperature"), 0.01),
                "accumulate": 2, "steps": 5, "data": [{"path": str(tiny.save_captions(tmp_path, 12))}],
            }
        ],
    }  # fmt: skip
    one, weights = run(recipe, tmp_path / "one", 1)
    two, others = run(recipe, tmp_path / "two", 2)
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-6)
        assert b["samples"] == a["samples"]
    for name, tensor in weights.items():
        # The softmax of attention does not feel a bias on all keys: its gradient is rounding, which Adam scales up.
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(others[name], tensor, rtol=1e-3, atol=2e-5, msg=name)
