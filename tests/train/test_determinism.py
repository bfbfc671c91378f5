"""One recipe and one seed give bit-identical weights, in two processes that have nothing in common."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from opticnerve import recipe as recipes
from opticnerve.common import atomic
from opticnerve.models.vlm.build import dock_recipe
from opticnerve.recipe import Recipe
from opticnerve.train.loop import run_stage

RUN = """
import sys
from pathlib import Path
from opticnerve import recipe as recipes
from opticnerve.models.vlm.build import dock_recipe
from opticnerve.train.loop import run_stage

recipe, out = recipes.load(sys.argv[1]), Path(sys.argv[2])
run_stage(dock_recipe(recipe), recipe, recipe.stages[0], out, trained_before=set())
"""


@pytest.mark.slow
def test_twice_the_same(make_recipe: Callable[..., Recipe], data: Path, tmp_path: Path) -> None:
    """Here and in a fresh process, with another order of Python's sets of strings and an empty cache."""
    recipe = make_recipe(
        train={"connector": 1e-2, "language.lora": 1e-2}, lora={"rank": 2, "dropout": 0.2}, steps=4, accumulate=2,
        pack={"tokens": 160, "window": 16}, cache_features=True, batch_size=2,
        data=[{"path": str(data / "captions.jsonl")}, {"path": str(data / "questions.jsonl")}],
    )  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.dump(recipe), encoding="utf-8")
    here, there = (tmp_path / "runs" / "stages" / name for name in ("here", "there"))
    run_stage(dock_recipe(recipe), recipe, recipe.stages[0], here, trained_before=set())
    environment = os.environ | {
        "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": str(torch.get_num_threads()), "OPTICNERVE_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    words = [sys.executable, "-c", RUN, str(path), str(there)]
    ran = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    curves = [
        [
            (line["loss"], line["grad_norm"], line["tokens"])
            for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        ]
        for folder in (here, there)
    ]
    assert curves[0] == curves[1]
    assert atomic.sha256(here / "trained.safetensors") == atomic.sha256(there / "trained.safetensors")
