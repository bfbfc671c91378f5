"""Trainings as processes: one at a time, stopped by a signal that lets them save, found again by whoever looks.

The program is a stand-in that takes `opticnerve train`'s words and writes a run folder, in milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from run_folders import make_run

from errors import refused
from opticnerve.types import OpticNerveError
from opticnerve.ui import runs
from opticnerve.ui.runs import lives, log_of, read_job, write_job
from opticnerve.ui.train_process import (
    changes_of,
    free_name,
    list_recipes,
    recipe_file,
    resume,
    start,
    stop,
    tail,
    watch,
)

STAND_IN = """
import json, pathlib, signal, sys, time
words = sys.argv[1:]
assert words[0] == "train"
resumed = words[1] == "--resume"
folder = pathlib.Path(words[2] if resumed else words[words.index("--out") + 1])
stage = folder / "stages" / "0-align"
stop = []

def ask(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as in training, a second one ends it at once
    stop.append(1)

signal.signal(signal.SIGTERM, ask)
if not resumed:
    stage.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(pathlib.Path(words[1]).read_text())
    (folder / "results.json").write_text("{}")
if "seed=13" in words:
    print("error: thirteen is refused", flush=True)
    sys.exit(1)
with (stage / "metrics.jsonl").open("a") as file:
    for step in range(1 + sum(1 for _ in (stage / "metrics.jsonl").open()), 100000):
        line = {"step": step, "loss": 2 / step, "tokens": 10, "elapsed_s": 0.01 * step}
        file.write(json.dumps(line) + "\\n")
        file.flush()
        print(f"align: step {step}/100000  loss {2 / step:.4f}  \\x1b[1m1000 tokens/s\\x1b[0m", flush=True)
        if stop:
            time.sleep(1.0)
            print("stopped; saved to checkpoint", flush=True)
            sys.exit(130)
        if (folder / "finish").exists():
            (folder / "results.json").write_text('{"tasks": []}')
            sys.exit(0)
        time.sleep(0.01)
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of runs with a recipe in it; what is trained below it is the stand-in, ended at last."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "stand_in_for_training.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "code"), prepend=os.pathsep)
    monkeypatch.setattr(runs, "PROGRAM", "stand_in_for_training")
    folder = tmp_path / "runs"
    folder.mkdir()
    recipe = {
        "model": {"language": {"name": "brain"}, "image": {"encoder": {"type": "hf_vision", "name": "eye"}}},
        "stages": [{"name": "align", "train": {"connector": 1e-3}, "data": [{"path": "x.jsonl"}], "epochs": 1}],
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(recipe))
    yield folder
    with contextlib.suppress(OpticNerveError):  # a test damages the record
        if (job := read_job(folder)) is not None and lives(job):
            os.kill(job.pid, 9)


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


def steps(root: Path) -> int:
    seen = watch(root)
    return seen.stage.steps if seen.stage is not None else 0


def test_a_training_is_started_watched_stopped_and_resumed(root: Path) -> None:
    assert watch(root).doing == "idle"
    job = start(root, "file:mine.yaml", "first", "seed=5 stages.0.epochs=2")
    assert os.getsid(job.pid) == job.pid  # of its own: closing the terminal of the server does not end it
    assert "seed=5 stages.0.epochs=2 --out" in job.command
    until(lambda: steps(root) >= 5)
    seen = watch(root)
    assert (seen.doing, seen.number, seen.count) == ("running", 1, 1)
    assert seen.total == 100000  # an epoch's steps are known from what it prints alone
    assert "\x1b" not in "".join(seen.log)

    asked = stop(root)
    assert watch(root).doing == "stopping"
    assert stop(root).asked == asked.asked  # a second signal would end it before it has saved
    until(lambda: watch(root).doing == "stopped")
    until(lambda: (read_job(root) or job).code == 130)
    assert watch(root).log[-1] == "stopped; saved to checkpoint"
    with refused("empty"):
        stop(root)

    before = steps(root)
    assert resume(root, "first").command.startswith("opticnerve train --resume ")
    until(lambda: steps(root) > before)
    (root / "first" / "finish").touch()
    until(lambda: watch(root).doing == "finished")
    with refused("refused", "first", "finished"):
        resume(root, "first")


def test_one_training_at_a_time(root: Path) -> None:
    start(root, "file:mine.yaml", "first")
    until(lambda: steps(root) > 0)
    make_run(root, "other", done=3)
    old = time.time() - 900
    for file in (root / "other").rglob("*"):
        os.utime(file, (old, old))
    for again in (lambda: start(root, "file:mine.yaml", "second"), lambda: resume(root, "other")):
        with refused("conflict", "first"):
            again()
    assert not (root / "second").exists()
    with refused("refused", "first", "running"):
        resume(root, "first")


def test_another_server_finds_the_training_and_can_stop_it(root: Path) -> None:
    start(root, "file:mine.yaml", "first")
    until(lambda: steps(root) > 0)
    code = (
        "import opticnerve_launch, sys; from pathlib import Path; from opticnerve.ui import runs, train_process as training\n"
        "runs.PROGRAM = 'stand_in_for_training'\n"
        "root = Path(sys.argv[1]); print(training.watch(root).doing); training.stop(root)"
    )
    told = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["running"]
    until(lambda: watch(root).doing == "stopped")


def test_an_error_is_told_and_no_stop(root: Path) -> None:
    job = start(root, "file:mine.yaml", "first", "seed=13")
    until(lambda: not lives(read_job(root)))
    until(lambda: (read_job(root) or job).code == 1)
    assert watch(root).doing == "failed"
    assert watch(root).log == ["error: thirteen is refused"]
    # Where the server that started it is gone, no one has seen the code.
    write_job(root, replace(job, code=None))
    assert watch(root).doing == "failed"


def test_a_process_that_only_has_the_number_is_left_alone(root: Path) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        import psutil

        created = psutil.Process(bystander.pid).create_time()
        for wrong in (created, created - 100):  # another program; another process of an earlier time
            write_job(root, runs.TrainingJob("first", bystander.pid, wrong, "opticnerve train", 0.0))
            assert not lives(read_job(root))
            with refused("empty"):
                stop(root)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.parametrize("words", [["--out", "runs/old"], ["--out=runs/old"], ["--resume", "runs/old"], ["mine.yaml"]])
def test_a_run_that_a_terminal_trains_is_not_gone_on_with(root: Path, words: list[str]) -> None:
    make_run(root, "old", done=3)
    for file in (root / "old").rglob("*"):
        os.utime(file, (1, 1))
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)", "opticnerve", "train", *words]
    other = subprocess.Popen(sleeper, cwd=root.parent)
    try:
        with refused("conflict", f"process {other.pid}"):
            resume(root, "old")
    finally:
        other.kill()
        other.wait()
    resume(root, "old")


def test_a_damaged_record_is_an_error_and_no_second_training(root: Path) -> None:
    (root / runs.FOLDER).mkdir()
    (root / runs.FOLDER / "training.json").write_text('{"run": ')
    for act in (lambda: watch(root), lambda: start(root, "file:mine.yaml", "first")):
        with refused("damaged", "training.json"):
            act()
    assert not (root / "first").exists()


def test_only_ready_recipes_and_those_below_the_root_are_trained(root: Path) -> None:
    outside = root.parent / "outside.yaml"
    outside.write_text((root / "mine.yaml").read_text())
    (root / "link.yaml").symlink_to(outside)
    make_run(root, "run")
    known = list_recipes(root)
    assert known[0] == "ready:starter"
    assert [c for c in known if c.startswith("file:")] == ["file:link.yaml", "file:mine.yaml"]
    assert recipe_file(root, "ready:starter").name == "starter.yaml"
    for choice in (
        "file:../outside.yaml",
        f"file:{outside}",
        str(outside),
        "ready:../recipes/starter",
        "file:link.yaml",
        "",
        "x",
    ):
        with refused("no-permission" if choice == "file:link.yaml" else "missing-file"):
            start(root, choice, "first")
    assert read_job(root) is None


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/tmp/x", "a/b", "-x", ".hidden", "x\0", "run", "n" * 81, "a b"]
)
def test_names_that_are_no_new_folder_are_refused(root: Path, name: str) -> None:
    make_run(root, "run")
    with refused("exists-already" if name == "run" else "wrong-type"):
        start(root, "file:mine.yaml", name)
    assert read_job(root) is None


@pytest.mark.parametrize("change", [
    "--out=/tmp/x", "--resume", "stages.0.data=[{path: /etc}]", "stages.0.data.0.path=/etc", "model.language.name=/x",
    "model.image.encoder.type=os:system", "trackers=[wandb]", "steps", "seed=$(id)", "seed=1;id", "-h", "seed=",
])  # fmt: skip
def test_changes_reach_no_files_and_no_code(root: Path, change: str) -> None:
    with pytest.raises(OpticNerveError):
        start(root, "file:mine.yaml", "first", change)
    assert read_job(root) is None


def test_a_wrong_recipe_is_told_before_anything_starts(root: Path) -> None:
    assert changes_of(" seed=1  stages.0.train.connector=1e-4 ") == ["seed=1", "stages.0.train.connector=1e-4"]
    with refused("recipe", "stages.0.steps", "-1"):
        start(root, "file:mine.yaml", "first", "stages.0.steps=-1")
    (root / "mine.yaml").write_text("modle: {}")
    with refused("recipe", "modle", "'model'"):
        start(root, "file:mine.yaml", "first")
    assert not (root / "first").exists()


def test_a_free_name_is_found(root: Path) -> None:
    assert free_name(root, "ready:starter") == "starter"
    (root / "starter").mkdir()
    assert free_name(root, "ready:starter") == "starter-2"
    assert free_name(root, "file:sub/wei rd$.yml") == "wei-rd"


def test_the_tail_of_a_long_output_is_read(root: Path) -> None:
    log = log_of(root, "sub/run")
    assert tail(log) == []
    log.parent.mkdir(exist_ok=True)
    log.write_bytes(b"x" * 100_000 + b"\n\x1b[31mred\x1b[0m\r\n\n50%\r100%\n\xff\x00\n")
    assert tail(log)[1:] == ["red", "50%", "100%", "�"]
    assert len(tail(log)[0]) < 40_000
