"""float16 weights with a scaled loss: what float32 learns, exact resume, and steps whose gradients overflow."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from errors import refused
from opticnerve.models.freeze import Frozen
from opticnerve.models.vlm.build import dock_recipe
from opticnerve.train import checkpoint, optim
from opticnerve.train.divergence import Diverged
from opticnerve.train.optim import MasterAdamW
from opticnerve.types import RecipeError

TRAIN = {"connector": 1e-2, "language.lora": 1e-3}


def lines(folder: Path, name: str = "run") -> list[dict[str, Any]]:
    return [json.loads(x) for x in (folder / name / "stages" / "0-align" / "metrics.jsonl").read_text().splitlines()]


def test_learns_what_float32_learns(make_recipe: Callable[..., Any], train: Callable[..., Any], tmp_path: Path) -> None:
    for precision in ("fp16", "fp32"):
        made, _ = train(make_recipe(precision=precision, train=TRAIN, steps=6), precision)
        assert {p.dtype for p in made.model.parameters()} == {getattr(torch, f"float{precision[2:]}")}
    half, whole = lines(tmp_path, "fp16"), lines(tmp_path, "fp32")
    assert [x["loss"] for x in half] == pytest.approx([x["loss"] for x in whole], rel=1e-2)
    assert [x["grad_norm"] for x in half] == pytest.approx([x["grad_norm"] for x in whole], rel=5e-2)
    assert {x["loss_scale"] for x in half} == {65536.0}
    assert "loss_scale" not in whole[0]


def test_resumed_to_the_bit(
    make_recipe: Callable[..., Any], train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optim, "_DOUBLE_AFTER", 2)
    monkeypatch.setattr(optim, "_FIRST_SCALE", 1024.0)
    recipe = make_recipe(precision="fp16", train=TRAIN, steps=5)
    whole, _ = train(recipe, "whole")
    train(recipe, "broken", stop_at=3)
    last = checkpoint.load(checkpoint.checkpoints(tmp_path / "broken" / "stages" / "0-align")[-1])
    assert last["optimizer"]["scaler"] == {"scale": 2048.0, "good_steps": 3}
    again, _ = train(recipe, "broken", resume=True)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
    assert [x["loss_scale"] for x in lines(tmp_path, "broken")] == [1024.0] * 2 + [2048.0] * 2 + [4096.0]
    assert [x["loss"] for x in lines(tmp_path, "broken")] == [x["loss"] for x in lines(tmp_path, "whole")]


def test_a_step_that_overflows_is_not_taken(
    make_recipe: Callable[..., Any], train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optim, "_FIRST_SCALE", 2.0**40)
    made, result = train(make_recipe(precision="fp16", steps=3))
    found = lines(tmp_path)
    assert [x["loss_scale"] for x in found] == [2.0**40, 2.0**39, 2.0**38]
    assert all(x["overflow"] and x["grad_norm"] is None and x["loss"] > 0 for x in found)
    assert result.left_out == []
    fresh = dict(dock_recipe(make_recipe(precision="fp16")).model.named_parameters())
    assert all(torch.equal(p, fresh[n]) for n, p in made.model.named_parameters())


def test_a_scale_that_is_low_already_is_no_excuse() -> None:
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.float16))
    made = MasterAdamW(Frozen([], {"c": {"w": weight}}, {"c": 0.5}), betas=(0.9, 0.95), weight_decay=0.0)
    made.scale = 2.0
    assert made.overflowed()
    assert not made.overflowed()
    weight.grad = torch.full_like(weight, torch.inf)
    assert not torch.isfinite(made.clip(1.0))
    assert torch.equal(weight, torch.ones_like(weight))


def test_a_loss_that_is_no_number_diverges(make_recipe: Callable[..., Any], train: Callable[..., Any]) -> None:
    recipe = make_recipe(precision="fp16")
    made = dock_recipe(recipe)
    with torch.no_grad():
        made.model.language_model.get_output_embeddings().weight.fill_(torch.nan)
    with refused("diverged", error=Diverged):
        train(recipe, dock=made)


def test_known_precisions(make_recipe: Callable[..., Any]) -> None:
    with refused("recipe", "bf16", "fp16", "fp32", error=RecipeError):
        make_recipe(precision="fp8")
