"""A mixture of experts through a whole stage: the plan, training, resume, what is saved, answers, two processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import worlds
from test_many_processes import make, run, same  # noqa: F401 (a fixture)

import tiny
from opticnerve.inference.generate import Answerer
from opticnerve.language.experts import is_expert
from opticnerve.models import OpticNerveForConditionalGeneration
from opticnerve.plan import plan
from opticnerve.types import ask


@pytest.mark.parametrize(
    "stage",
    [
        {"train": {"connector": 1e-2, "language": 1e-3}, "accumulate": 2},
        {"train": {"connector": 1e-2, "language.lora": 1e-2}, "lora": {"rank": 2}},
    ],
    ids=["all", "adapter"],
)
def test_a_stage_resumes_exactly_and_comes_back_from_its_folder(
    make_recipe: Callable[..., Any], resumed_exactly: Callable[..., Any], tmp_path: Path, stage: dict[str, Any]
) -> None:
    recipe = make_recipe(language_part="qwen3_moe", **stage)
    whole, _ = resumed_exactly(recipe)
    folder = tmp_path / "whole" / "stages" / "0-align"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    balanced = "language" in stage["train"]
    assert all(("router_loss" in line.get("metrics", {})) is balanced for line in lines)
    asked = ask("what is it?", tiny.picture(1))
    loaded = Answerer(*(OpticNerveForConditionalGeneration.from_pretrained(folder), whole.processor))
    assert loaded.answer([asked]) == Answerer(whole.model, whole.processor).answer([asked])


def test_the_plan_counts_all_and_active(make_recipe: Callable[..., Any], train: Callable[..., Any]) -> None:
    recipe = make_recipe(language_part="qwen3_moe", train={"language": 1e-3})
    made, dense = plan.make(recipe), plan.make(make_recipe(language_part="qwen3", train={"language": 1e-3}))
    dock, _ = train(recipe)
    counts = {n: p.numel() for n, p in dock.model.language_model.named_parameters()}
    experts = sum(count for name, count in counts.items() if is_expert(name))
    [language] = [s for s in made.shapes if s.part == "language"]
    assert (language.parameters, language.active) == (sum(counts.values()), sum(counts.values()) - experts // 2)
    assert made.stages[0].memory.weights == 4 * made.stages[0].total
    assert made.stages[0].trained == sum(counts.values())
    # Two experts of width 24 of the four do as much as one layer of width 48, beside the router's few products.
    assert 1.0 < made.stages[0].flops / dense.stages[0].flops < 1.03


@pytest.mark.slow
@pytest.mark.usefixtures("private_cache")
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_balance_as_one(
    make: Callable[..., dict[str, Any]], tmp_path: Path, engine: str  # noqa: F811
) -> None:  # fmt: skip
    recipe = make(
        language_part="qwen3_moe", train={"connector": 1e-2, "language": 1e-3}, batch_size=8, accumulate=2, steps=4
    )
    one, two = run(recipe, tmp_path / "one", 1), run(recipe, tmp_path / "two", 2, engine)
    same(one, two)
    for a, b in zip(worlds.curve(one), worlds.curve(two), strict=True):
        assert b["metrics"]["router_loss"] > 0, a
