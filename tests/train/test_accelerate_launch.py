"""`accelerate launch` itself, with the files of recipes/launch, on two processes of the CPU: the curve of one process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import worlds
import yaml
from test_many_processes import make, same  # noqa: F401 (a fixture)

LAUNCH = Path(__file__).resolve().parents[2] / "recipes" / "launch"
pytestmark = [pytest.mark.usefixtures("private_cache"), pytest.mark.slow]


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp2-sharded", "deepspeed-zero2", "deepspeed-zero3"])
def test_launched_processes_are_one(
    name: str, make: Callable[..., dict[str, Any]], tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    if name.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("the engine deepspeed is not installed")
    recipe = make(steps=3)
    recipe["stages"].append({**recipe["stages"][0], "name": "tune", "train": {"language": 1e-4}, "steps": 2})
    [ended] = worlds.world(1, worlds.train, recipe, tmp_path / "one", folder=tmp_path)
    assert ended.code == 0, ended.printed[-3000:]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    launched = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / f"{name}.yaml"),
         "--num_processes", "2", "--main_process_port", "0", "-m", "opticnerve_launch",
         "train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert launched.returncode == 0, (launched.stdout + launched.stderr)[-4000:]
    same(tmp_path / "one", tmp_path / "run")
    for a, b in zip(worlds.curve(tmp_path / "one", 1), worlds.curve(tmp_path / "run", 1), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-6)
    assert (tmp_path / "run" / "card.md").is_file()
