"""Gradient checkpointing of some layers; and CUDA's allocator, which is asked to grow its segments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers.modeling_layers import GradientCheckpointingLayer

from errors import refused
from opticnerve.plan import plan
from opticnerve.recipe import Recipe
from opticnerve.runs.pipeline import run_recipe
from opticnerve.train.memory import expandable_segments, recomputed_layers
from opticnerve.types import RecipeError

SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def test_so_many_layers_are_computed_again_and_nothing_else_changes(
    make_recipe: Callable[..., Recipe], train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = train(make_recipe(), "plain")
    again: list[GradientCheckpointingLayer] = []
    called = GradientCheckpointingLayer.__call__

    def seen(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.gradient_checkpointing and self.training:
            again.append(self)
        return called(self, *args, **kwargs)

    monkeypatch.setattr(GradientCheckpointingLayer, "__call__", seen)
    some, _ = train(make_recipe(gradient_checkpointing=1), "some")
    first = next(m for m in some.model.language_model.modules() if isinstance(m, GradientCheckpointingLayer))
    assert {id(layer) for layer in again} == {id(first)}
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(some.model.state_dict()[name], tensor), name
    for wanted, count in ((False, 0), (True, 2), (1, 1), (2, 2), (0.3, 1), (0.6, 2)):
        assert recomputed_layers(some.model, wanted) == count
    with refused("conflict", "3 layers", "has 2"):
        recomputed_layers(some.model, 3)


def test_as_few_layers_as_keep_a_budget(
    make_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def needs(wanted: object) -> int:
        memory = plan.make(make_recipe(gradient_checkpointing=wanted)).stages[0].memory
        return memory.total - memory.process

    none, one, both = needs(False), needs(1), needs(2)
    assert both <= one < none
    chosen, weights = {}, {}
    for budget in (none, none - 1, one):
        recipe = make_recipe(gradient_checkpointing=f"{budget}B")
        [planned] = plan.make(recipe).stages
        [settled], [said] = plan.within_budgets(recipe)
        chosen[budget] = planned.recomputed
        assert settled.gradient_checkpointing == planned.recomputed
        assert f"{planned.recomputed} of 2 layers" in said
        assert any(said in remark.text for remark in plan.make(recipe).remarks)
    assert chosen == {none: 0, none - 1: 1, one: 1}
    with refused("out-of-range", "all 2 layers"):
        plan.within_budgets(make_recipe(gradient_checkpointing=f"{both - 1}B"))
    for name, wanted in (("plain", False), ("kept", f"{one}B")):
        recipe = make_recipe(gradient_checkpointing=wanted).model_copy(update={"forgetting": False})
        run_recipe(recipe, tmp_path / name, console=Console())
        weights[name] = load_file(tmp_path / name / "trained.safetensors")
    assert "1 of 2 layers" in capsys.readouterr().out
    assert all(torch.equal(weights["kept"][n], t) for n, t in weights["plain"].items())


def test_a_budget_is_no_number_of_layers(make_recipe: Callable[..., Recipe], train: Callable[..., Any]) -> None:
    with refused("unsupported", "number of layers"):
        train(make_recipe(gradient_checkpointing="4GiB"), "alone")
    for wrong in ("-1GiB", "much", "4 GiB or so"):
        with pytest.raises(RecipeError):
            make_recipe(gradient_checkpointing=wrong)


def test_segments_grow_unless_somebody_set_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    def told(**given: str) -> list[str | None]:
        for name in SETTINGS:
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        expandable_segments()
        return [os.environ.get(name) for name in SETTINGS]

    assert told() == [None, None]  # no CUDA, nothing to set
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert told() == ["expandable_segments:True", None]
    assert told(PYTORCH_CUDA_ALLOC_CONF="max_split_size_mb:64") == ["max_split_size_mb:64", None]
    assert told(PYTORCH_ALLOC_CONF="") == [None, ""]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert told() == [None, None]
