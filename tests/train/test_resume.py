"""What a run folder holds when a run has been stopped, or killed, in any place, and what resuming makes of it."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from errors import refused
from opticnerve.common import atomic, drawing
from opticnerve.features import store as feature_cache
from opticnerve.recipe import Recipe
from opticnerve.runs import folder as run_folder
from opticnerve.runs import pipeline
from opticnerve.runs.pipeline import run_recipe
from opticnerve.train import checkpoint
from opticnerve.train.metrics import MetricsLog, steps_in
from opticnerve.train.state import load_rng_state

pytestmark = pytest.mark.usefixtures("private_cache")
Train = Callable[..., Any]
Make = Callable[..., Recipe]


def stage_folder(tmp_path: Path, run: str = "run") -> Path:
    return tmp_path / run / "stages" / "0-align"


class TestMetrics:
    """One line a step, without gaps or repeats."""

    def lines(self, *steps: int) -> str:
        return "".join(f'{{"step": {s}, "loss": 1.0}}\n' for s in steps)

    @pytest.mark.parametrize(
        ("written", "whole"),
        [
            ("", 0),
            ("1 2 3", 3),
            ("1 2 3 torn", 3),
            ("1 2 2 3", 2),
            ("1 2 4", 2),
            ("2 3", 0),
            ("1 torn-line 3", 1),
        ],
    )
    def test_whole_lines_are_counted(self, tmp_path: Path, written: str, whole: int) -> None:
        path = tmp_path / "metrics.jsonl"
        text = "".join(
            self.lines(int(w)) if w.isdigit() else '{"step": 9, "lo' + "\n" * ("line" in w) for w in written.split()
        )
        path.write_text(text)
        assert steps_in(path) == whole
        with MetricsLog(path, 2) as log:
            log.write({"step": min(whole, 2) + 1})
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(1, min(whole, 2) + 2))

    def test_none_at_all(self, tmp_path: Path) -> None:
        assert steps_in(tmp_path / "metrics.jsonl") == 0

    def test_killed_in_mid_line_and_ahead_of_the_checkpoint(
        self, make_recipe: Make, train: Train, tmp_path: Path
    ) -> None:
        recipe = make_recipe(steps=5, save_every=2)
        train(recipe, "whole")
        train(recipe, "broken", stop_at=2)
        path = stage_folder(tmp_path, "broken") / "metrics.jsonl"
        path.write_text(path.read_text() + self.lines(3) + '{"step": 4, "lo')
        train(recipe, "broken", resume=True)
        wanted = [
            json.loads(x)["loss"] for x in (stage_folder(tmp_path, "whole") / "metrics.jsonl").read_text().splitlines()
        ]
        assert [json.loads(x)["loss"] for x in path.read_text().splitlines()] == wanted

    def test_behind_every_checkpoint(self, make_recipe: Make, train: Train, tmp_path: Path) -> None:
        recipe = make_recipe(steps=5)
        train(recipe, stop_at=3)
        path = stage_folder(tmp_path) / "metrics.jsonl"
        path.write_text(self.lines(1))
        with refused("damaged", "checkpoint-00000003", "metrics.jsonl", "step 1"):
            train(recipe, resume=True)


class TestOtherData:
    @pytest.mark.parametrize("change", ["one word", "one more", "another order"])
    @pytest.mark.parametrize("pack", [None, {"tokens": 100, "window": 6}])
    def test_refused_with_both_numbers(
        self, make_recipe: Make, train: Train, tmp_path: Path, change: str, pack: Any
    ) -> None:
        path = tiny.save_captions(tmp_path / "mine")
        recipe = make_recipe(data=[{"path": str(path)}], steps=3, pack=pack, batch_size=2)
        train(recipe, stop_at=1)
        lines = path.read_text().splitlines()
        if change == "one word":
            lines[3] = lines[3].replace("foxes", "hounds")
        elif change == "one more":
            lines.append(lines[0])
        else:
            lines.reverse()
        path.write_text("\n".join(lines) + "\n")
        with refused("mismatch", "sha256 was ", " and is ") as raised:
            train(recipe, resume=True)
        assert ("units was 6 and is 7" in str(raised.value)) == (change == "one more")

    def test_the_same_data_in_another_folder(self, make_recipe: Make, train: Train, tmp_path: Path) -> None:
        """A run may go on on another machine; the recipe names the folder by a variable then."""
        for name in ("here", "there"):
            tiny.save_captions(tmp_path / name)
        first, then = (
            make_recipe(data=[{"path": str(tmp_path / n / "captions.jsonl")}], steps=3) for n in ("here", "there")
        )
        train(first, stop_at=1)
        _, result = train(then, resume=True)
        assert result.steps == 3


def test_as_many_checkpoints_as_the_recipe_says(make_recipe: Make, train: Train, tmp_path: Path) -> None:
    train(make_recipe(steps=6, save_every=1, keep_checkpoints=3))
    assert [p.name[-1] for p in checkpoint.checkpoints(stage_folder(tmp_path))] == ["3", "4", "5"]


def test_a_disk_that_fills_up_stops_the_run(
    make_recipe: Make, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the checkpoint before whole, from which the run goes on once there is room."""
    recipe = make_recipe(steps=5, save_every=1)
    whole, _ = train(recipe, "whole")
    save = checkpoint.save

    def fuller(folder: Path, step: int, *args: Any, **options: Any) -> Path:
        if step == 3:
            monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        return save(folder, step, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", fuller)
        with refused("disk-full", "1 kB", "checkpoint-00000002", error=atomic.DiskFull):
            train(recipe)
    monkeypatch.undo()
    assert [p.name[-1] for p in checkpoint.checkpoints(stage_folder(tmp_path))] == ["1", "2"]
    again, _ = train(recipe, resume=True)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor)


def test_another_number_of_processes(tmp_path: Path) -> None:
    """The first goes on with its random numbers, the others begin theirs as in a fresh run, and it is said."""
    torch.manual_seed(1)
    states = [checkpoint.rng_state() for _ in range(2)]
    wanted = torch.rand(2)
    for rank, goes_on in ((0, True), (1, False)):
        said: list[str] = []
        accelerator = SimpleNamespace(process_index=rank, num_processes=4, device=torch.device("cpu"))
        torch.manual_seed(7)
        fresh = torch.rand(2)
        torch.manual_seed(7)
        load_rng_state(states, accelerator, said.append)
        assert torch.equal(torch.rand(2), wanted if goes_on else fresh)
        assert "2 processes, these are 4" in said[0]


class TestWholeRuns:
    """Of the pipeline: two stages, an evaluation, and stops between and within them."""

    @pytest.fixture
    def recipe(self, make_recipe: Make, data: Path) -> Recipe:
        one = make_recipe(steps=2, cache_features=True)
        stage = one.stages[0].model_copy(update={"name": "again", "cache_features": False})
        questions = {"data": {"path": str(data / "questions.jsonl")}, "sample": 4, "max_new_tokens": 2}
        made = one.model_dump() | {"stages": [one.stages[0].model_dump(), stage.model_dump()], "forgetting": False}
        return Recipe.model_validate(made | {"evaluate": [questions]})

    def outcome(self, run: Path) -> dict[str, Any]:
        results = json.loads((run / "results.json").read_text())
        return {k: results[k] for k in ("tasks", "image_dependence")} | {
            str(f.relative_to(run)): atomic.sha256(f) for f in run.rglob("*.safetensors")
        }

    def stopped(self, number: int) -> Callable[..., Any]:
        def stop(*_: Any, **__: Any) -> None:
            signal.raise_signal(number)

        return stop

    def test_stopped_while_caching_and_while_evaluating(
        self, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ctrl-C and, as the command has it, SIGTERM end what is under way; all that was finished is kept."""
        monkeypatch.setattr(drawing, "_DPI", 30)
        run_recipe(recipe, tmp_path / "whole")
        # Both: a process begun in the background of a shell ignores SIGINT.
        before = {n: signal.signal(n, signal.default_int_handler) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            for resume, where, name, number in (
                (False, feature_cache.FeatureStore, "fill", signal.SIGTERM),
                (True, pipeline, "evaluate_model", signal.SIGINT),
                (True, pipeline, "publish", signal.SIGTERM),
            ):
                with monkeypatch.context() as patch:
                    patch.setattr(where, name, self.stopped(number))
                    if name == "fill":
                        patch.setenv("OPTICNERVE_CACHE", str(tmp_path / "cache"))
                    with pytest.raises(KeyboardInterrupt):
                        run_recipe(recipe, tmp_path / "run", resume=resume)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        trained: list[Any] = []
        monkeypatch.setattr(pipeline, "run_stage", lambda *a, **k: trained.append(a))
        run_recipe(recipe, tmp_path / "run", resume=True)
        assert trained == []  # both stages were finished when the evaluation was stopped
        assert self.outcome(tmp_path / "run") == self.outcome(tmp_path / "whole")

        weights = tmp_path / "run" / "stages" / "1-again" / "trained.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with refused("mismatch", "1-again/trained.safetensors", "SHA-256"):
            run_recipe(recipe, tmp_path / "run", resume=True)
        weights.unlink()
        with refused("mismatch", "trained.safetensors", "nothing"):
            run_recipe(recipe, tmp_path / "run", resume=True)

    def test_a_changed_recipe_is_refused_by_its_keys(self, recipe: Recipe, tmp_path: Path) -> None:
        run_folder.keep_recipe(recipe, tmp_path, False)
        run_folder.keep_recipe(recipe, tmp_path, True)
        changed = recipe.model_copy(update={"seed": 5, "stages": recipe.stages[:1]})
        with refused("mismatch", "seed: 0 there, 5 given", "stages: ["):
            run_folder.keep_recipe(changed, tmp_path, True)

    def test_damaged_records_are_named(self, tmp_path: Path) -> None:
        (tmp_path / "results.json").write_text('{"a": ')
        with refused("damaged", tmp_path / "results.json"):
            run_folder.Results(tmp_path / "results.json", fresh=False)
        (tmp_path / "result.json").write_text("[]")
        with refused("damaged", tmp_path / "result.json", "list"):
            run_folder.finished_stage(tmp_path)
