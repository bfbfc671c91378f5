"""A process that dies, stops or finds bad data ends all others within bounded time, with a message that names it; and
what was saved before is whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import worlds
import yaml
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

import tiny
from opticnerve.train import checkpoint

pytestmark = [pytest.mark.usefixtures("private_cache"), pytest.mark.slow]


@pytest.fixture
def recipe(language_folder: Callable[..., str], vision_folder: Callable[..., str], tmp_path: Path) -> dict[str, Any]:
    stage = {
        "name": "align", "train": {"connector": 1e-2}, "batch_size": 4, "steps": 6, "save_every": 2,
        "data": [{"path": str(tiny.save_captions(tmp_path / "data"))}],
    }  # fmt: skip
    vision_encoder = {"type": "hf_vision", "name": vision_folder("clip_vision_model")}
    model = {"language": {"name": language_folder("llama")}, "image": {"encoder": vision_encoder}}
    return {"precision": "fp32", "model": model, "stages": [stage], "forgetting": False}


def saved_step(out: Path) -> int:
    state = checkpoint.newest(out / "stages" / "0-align")
    assert state is not None
    return int(state["step"])


@pytest.mark.parametrize(
    ("hurt", "means"),
    [("1 3 SIGKILL", worlds.FSDP2), ("0 3 SIGKILL", {}), ("1 3 SIGSTOP", {})],
    ids=["killed", "the first killed", "stopped"],
)
def test_a_lost_process_ends_all_with_its_name(
    hurt: str, means: dict[str, str], recipe: dict[str, Any], tmp_path: Path
) -> None:
    """Killed: the exchange fails at once. Stopped: its signs of life stay away."""
    lost = int(hurt[0])
    found = worlds.world(
        2, worlds.train, recipe, tmp_path / "run", False, hurt, folder=tmp_path, after_failure=1 if "STOP" in hurt else 40,
        environment={"OPTICNERVE_TIMEOUT": "20", **means},
    )  # fmt: skip
    other = found[1 - lost]
    assert found[lost].code in (-9, None)  # None: still stopped
    assert other.code == 1, other.printed[-3000:]
    assert f"process {lost} of 2" in other.printed
    assert "ended or does not answer" in other.printed
    assert saved_step(tmp_path / "run") == 2


def test_bad_data_on_one_process_ends_all_with_its_words_and_saves_once(recipe: dict[str, Any], tmp_path: Path) -> None:
    for name, means in (("ddp", {}), ("fsdp2", worlds.FSDP2)):
        out = tmp_path / name
        found = worlds.world(2, worlds.train, recipe, out, False, "1 3 error", folder=tmp_path, environment=means)
        for ended in found:
            assert ended.code == 1
            assert "captions.jsonl, line 3: the picture is torn" in ended.printed
        assert "process 1 of 2" in found[0].printed
        assert saved_step(out) == 3  # all stood at the same step, and saved it together
    # what was saved goes on, on one process
    [ended] = worlds.world(1, worlds.train, recipe, tmp_path / "fsdp2", True, folder=tmp_path)
    assert ended.code == 0, ended.printed[-3000:]
    assert [line["step"] for line in worlds.curve(tmp_path / "fsdp2")] == list(range(1, 7))


def test_the_launcher_ends_a_job_whose_process_dies_and_resumes_it(recipe: dict[str, Any], tmp_path: Path) -> None:
    """torchrun's agent over the command line, by FSDP2, killed in step 4 of the first stage of two: no process of the job
    is left. Resumed, it draws one process's curves; the main process finds a whole model to measure and to save."""
    recipe["stages"].append({**recipe["stages"][0], "name": "tune", "train": {"language.lora": 1e-3}, "steps": 3})
    [ended] = worlds.world(1, worlds.train, recipe, tmp_path / "one", folder=tmp_path)
    assert ended.code == 0, ended.printed[-3000:]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = ["train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]
    with pytest.raises(ChildFailedError, match="Signal 9"):
        worlds.torchrun(2, command, tmp_path, hurt="1 3 SIGKILL", environment=worlds.FSDP2)
    assert saved_step(tmp_path / "run") == 2
    worlds.torchrun(2, [*command, "--resume"], tmp_path, environment=worlds.FSDP2)
    for stage in (0, 1):
        for a, b in zip(worlds.curve(tmp_path / "one", stage), worlds.curve(tmp_path / "run", stage), strict=True):
            assert b["step"] == a["step"]
            assert b["loss"] == pytest.approx(a["loss"], rel=2e-6)
    assert (tmp_path / "run" / "card.md").is_file()
