"""`train`, `demo`, `ask`, `eval` and `merge`: what they pass on, what they refuse, what a script reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from errors import refused
from opticnerve import recipe as recipes
from opticnerve.cli.train import _clear, check_folder

RESULTS = {
    "stages": [{"name": "align", "steps": 3, "samples": 6, "seconds": 1.5, "final_loss": 2.0}],
    "tasks": [{"name": "t", "n": 2, "accuracy": 0.5, "ci95": [0.1, 0.9], "by_type": {"yes/no": {"n": 2, "accuracy": 0.5}},
               "samples": [{"question": "secret"}]}],
    "image_dependence": {"n": 2, "real": 0.5, "blank": 0.25, "shuffled": 0.0},
    "forgetting": [{"after": "untouched", "perplexity": float("nan"), "logits_identical": None, "answers": []}],
}  # fmt: skip


@pytest.fixture
def ran_with(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The pipeline replaced by one that notes how it was called."""
    from opticnerve.runs import pipeline

    seen: dict[str, Any] = {}

    def run_recipe(recipe: Any, run_dir: Path, **options: Any) -> dict[str, Any]:
        seen.update(recipe=recipe, run_dir=run_dir, **options)
        options["console"].print("progress")
        return RESULTS

    monkeypatch.setattr(pipeline, "run_recipe", run_recipe)
    return seen


def test_train_passes_recipe_overrides_and_command_on(
    opticnerve: Callable[..., Any], ran_with: dict[str, Any], recipe_file: Path, tmp_path: Path
) -> None:
    ran = opticnerve("train", recipe_file, "stages.0.steps=7", "--out", tmp_path / "run")
    assert ran.code == 0, ran.err
    assert ran_with["recipe"].stages[0].steps == 7
    assert ran_with["run_dir"] == tmp_path / "run"
    assert ran_with["command"] == f"opticnerve train {recipe_file} stages.0.steps=7 --out {tmp_path / 'run'}"
    assert "50.0%" in ran.out
    assert "+25.0 points" in ran.out


def test_train_json_is_alone_on_stdout_and_strict(
    opticnerve: Callable[..., Any], ran_with: dict[str, Any], recipe_file: Path, tmp_path: Path
) -> None:
    ran = opticnerve("train", recipe_file, "--out", tmp_path / "run", "--json")
    found = json.loads(ran.out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert found["run"] == str(tmp_path / "run")
    assert found["forgetting"][0]["perplexity"] is None
    assert "secret" not in ran.out
    assert "progress" in ran.err


def test_an_interrupted_run_says_how_to_go_on(
    opticnerve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, recipe_file: Path, tmp_path: Path
) -> None:
    from opticnerve.runs import pipeline
    from opticnerve.train.loop import Interrupted

    def stop(*_: Any, **__: Any) -> None:
        raise Interrupted(tmp_path / "checkpoint-1")

    monkeypatch.setattr(pipeline, "run_recipe", stop)
    ran = opticnerve("train", recipe_file, "--out", tmp_path / "run")
    assert ran.code == 130
    assert "checkpoint-1" in ran.err
    assert f"opticnerve train --resume {tmp_path / 'run'}" in ran.err


def test_a_folder_alone_is_resumed_with_its_own_recipe(
    opticnerve: Callable[..., Any], ran_with: dict[str, Any], recipe_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    kept = recipes.load(recipe_file, ["stages.0.steps=9"])
    (run / "recipe.yaml").write_text(recipes.dump(kept), encoding="utf-8")
    for words in (("--resume", run), (run, "--resume"), ("--resume", run, "--out", run)):
        ran_with.clear()
        ran = opticnerve("train", *words)
        assert ran.code == 0, ran.err
        assert (ran_with["recipe"], ran_with["run_dir"], ran_with["resume"]) == (kept, run, True)
    ran = opticnerve("train", "--resume", run, "--out", tmp_path / "other")
    assert ran.code == 1
    assert "leave out --out" in ran.err
    assert "go on with the run in it by --resume" in opticnerve("train", run).err
    (run / "recipe.yaml").unlink()
    assert "no recipe.yaml" in opticnerve("train", "--resume", run).err


def test_another_recipe_than_the_folders_is_refused_by_its_keys(
    opticnerve: Callable[..., Any], recipe_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(recipes.dump(recipes.load(recipe_file)), encoding="utf-8")
    changed = ("stages.0.batch_size=1", "stages.0.train.connector=0.5", "seed=3")
    ran = opticnerve("train", recipe_file, *changed, "--out", run, "--resume")
    assert ran.code == 1
    for words in ("stages.0.batch_size: ", "stages.0.train.connector: ", "seed: 0 there, 3 given", "--resume"):
        assert words in ran.err, ran.err
    assert "steps" not in ran.err


def test_finished_work_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    with refused("exists-already", tmp_path, "--resume"):
        check_folder(tmp_path, resume=False)
    check_folder(tmp_path, resume=True)
    check_folder(tmp_path / "new", resume=False)
    with refused("missing-file", tmp_path / "new"):
        check_folder(tmp_path / "new", resume=True)


def test_overwrite_deletes_runs_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "mine" / "precious").mkdir(parents=True)
    with refused("exists-already", tmp_path / "mine"):
        _clear(tmp_path / "mine", resume=False, overwrite=True)
    assert (tmp_path / "mine" / "precious").is_dir()
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").touch()
    (run / "results.json").touch()
    with refused("exists-already", run, "--overwrite"):
        _clear(run, resume=False, overwrite=False)
    _clear(run, resume=False, overwrite=True)
    assert not run.exists()


def test_a_run_of_tiny_parts_is_trained_asked_and_evaluated(
    opticnerve: Callable[..., Any], recipe_file: Path, captions: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert opticnerve("train", recipe_file, "--out", run).code == 0
    picture = captions.parent / "red.png"
    ran = opticnerve("ask", run, "what is this?", "--image", picture, "--max-new-tokens", "3", "--json")
    assert ran.code == 0, ran.err
    assert set(ran.json) == {"model", "question", "images", "audios", "answer", "seconds"}
    plain = opticnerve("ask", run, "what is this?", "--image", picture, "--max-new-tokens", "3")
    assert plain.out == ran.json["answer"] + "\n"
    questions = captions.parent / "questions.jsonl"
    questions.write_text('{"image": "red.png", "question": "colour?", "answer": "red"}\n', encoding="utf-8")
    out = tmp_path / "results.json"
    ran = opticnerve("eval", run, "--data", questions, "--out", out, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["tasks"][0]["n"] == 1
    assert json.loads(out.read_text(encoding="utf-8"))["tasks"] == ran.json["tasks"]
    assert opticnerve("merge", run, tmp_path / "merged", "--json").json["bytes"] > 0
    assert opticnerve("merge", run, tmp_path / "merged").code == 1


def test_eval_wants_one_thing_to_evaluate_on(opticnerve: Callable[..., Any]) -> None:
    for words in ((), ("--data", "a.jsonl", "--recipe", "b.yaml")):
        ran = opticnerve("eval", "starter", *words)
        assert ran.code == 1
        assert "one of the three" in ran.err


def test_plan_shows_shapes_memory_sample_and_warnings(opticnerve: Callable[..., Any], recipe_file: Path) -> None:
    ran = opticnerve("plan", recipe_file, "--no-calibrate")
    assert ran.code == 0, ran.err
    for words in (
        "visual tokens per image",
        "Stage align",
        "gradients",
        "a| red| picture|",
        "no `evaluate:`",
        "matmul rate",
    ):
        assert words.replace("|", "") in ran.out.replace("|", "")
    ran = opticnerve("plan", recipe_file, "--json", "--no-calibrate")
    assert ran.json["sample"]["trained"] > 0
    assert ran.json["stages"][0]["steps"] == 1
