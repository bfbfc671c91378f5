"""Run folders as the page reads them: which there are, how far they came, and what is refused."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import PIL.Image
import pytest
from run_folders import EVIL, line, make_run, words

from errors import refused
from opticnerve.types import DataError
from opticnerve.ui import runs_html
from opticnerve.ui.i18n import RUN_TEXTS
from opticnerve.ui.runs import list_runs, open_run, read_file
from opticnerve.ui.runs_content import chosen, read_answers, thumbnail


def age(run: Path, seconds: float) -> None:
    for file in [run / "recipe.yaml", run / "results.json", *run.glob("stages/*/metrics.jsonl")]:
        os.utime(file, (time.time() - seconds, time.time() - seconds))


def test_runs_are_found_with_their_states_the_newest_first(tmp_path: Path) -> None:
    age(make_run(tmp_path, "old"), 900)
    age(make_run(tmp_path, "deep/er/half", done=7), 600)
    make_run(tmp_path, "going", done=3)
    make_run(tmp_path, "a/b/c/too-deep")
    make_run(tmp_path, ".hidden")
    (tmp_path / "empty").mkdir()
    assert [(r.name, r.state) for r in list_runs(tmp_path)] == [
        ("going", "running"), ("deep/er/half", "stopped"), ("old", "finished")
    ]  # fmt: skip
    half = open_run(tmp_path, "deep/er/half")
    assert [(s.name, s.steps, s.planned, s.finished) for s in half.stages] == [("align", 7, 40, False)]
    assert runs_html.progress(half.stages[0], words()) == "7 of 40"


def test_headline_figures_are_those_of_the_results(tmp_path: Path) -> None:
    make_run(tmp_path, "run")
    told = runs_html.summary(open_run(tmp_path, "run"), words())
    for part in ("90.0%", "86.0% to 93.0%", "+40.0", "21.30", "1 min 15 s", "3.00 GiB", "finished", "40 of 40"):
        assert part in told, part


def test_half_written_files_leave_the_rest_readable_and_are_told(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", done=5)
    metrics = run / "stages/0-align/metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 6, "lo')
    read = open_run(tmp_path, "run")
    assert (read.stages[0].steps, read.notes) == (5, [])  # a line that is being written is no fault
    (run / "results.json").write_text('{"tasks": [')
    metrics.write_text("no line\n" + json.dumps(line(1)) + "\n")
    read = open_run(tmp_path, "run")
    assert read.stages[0].metrics == []
    assert [n.partition(" ")[0].rstrip(":") for n in read.notes] == ["results.json", "stages/0-align/metrics.jsonl"]
    assert "results.json" in runs_html.summary(read, words())
    (run / "recipe.yaml").write_text("model: [")
    assert [s.name for s in open_run(tmp_path, "run").stages] == ["align"]


@pytest.mark.parametrize("results", [
    {"tasks": "all"}, {"tasks": [1, {"name": 3, "accuracy": "high", "ci95": 7, "samples": {}}]}, {"image_dependence": 5},
    {"image_dependence": {"real": 1}}, {"seconds": [1], "forgetting": [None], "stages": [{"image_use": 3}]},
    {"tasks": [{"name": "t", "accuracy": 1e999, "n": None}]},
])  # fmt: skip
def test_results_of_any_form_are_shown(tmp_path: Path, results: object) -> None:
    run = make_run(tmp_path, "run")
    (run / "results.json").write_text(json.dumps(results))
    read = open_run(tmp_path, "run")
    assert "run" in runs_html.summary(read, words())
    assert "run" in runs_html.runs_table(list_runs(tmp_path), words())
    for task in read.tasks:
        assert read_answers(read, str(task.get("name")))[0] == []


@pytest.mark.parametrize("name", ["../outside", "/", "", "nothing", "run/stages", "link", "x\0y", "n" * 5000])
def test_folders_that_are_no_runs_below_the_root_are_refused(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    make_run(root, "run")
    make_run(tmp_path, "outside")
    (root / "link").symlink_to(tmp_path / "outside")
    with refused("missing-file", repr(name), root):
        open_run(root, name)
    assert [r.name for r in list_runs(root)] == ["run"]


def test_no_file_outside_of_a_run_is_read(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run")
    secret = tmp_path / "secret.txt"
    secret.write_text('{"secret": 1}')
    (run / "results.json").unlink()
    for link in (run / "card.md", run / "results.json"):
        link.symlink_to(secret)
    (run / "stages/0-align/metrics.jsonl").unlink()
    (run / "stages/0-align/metrics.jsonl").symlink_to(secret)
    read = open_run(tmp_path, "run")
    assert (read.results, read.stages[0].metrics, len(read.notes)) == ({}, [], 2)
    for name in ("card.md", "../secret.txt", str(secret), "samples/../../secret.txt"):
        with refused("no-permission", name):
            read_file(run, name, 100)
    os.mkfifo(run / "pipe")  # reading it would wait forever
    with refused("wrong-type", "pipe"):
        read_file(run, "pipe", 100)
    (run / "big").write_bytes(bytes(101))
    with refused("too-large", "big"):
        read_file(run, "big", 100)
    assert read_file(run, "big", 101) == bytes(101)


def test_answers_are_all_there_once_and_can_be_filtered(tmp_path: Path) -> None:
    make_run(tmp_path, "run", answers=30)
    read = open_run(tmp_path, "run")
    answers, note = read_answers(read, "shapes")
    assert (len(answers), note) == (30, "")
    assert [a.question for a in answers] == [f"what color is shape {i}?" for i in range(30)]
    assert [bool(a.image) for a in answers] == [True] * 24 + [False] * 6
    assert [a.question.split()[-1] for a in chosen(answers, "wrong")] == [f"{i}?" for i in range(0, 30, 3)]
    assert len(chosen(answers, "right")) == 20
    with (tmp_path / "run/answers/shapes.jsonl").open("a") as file:
        file.write('{"question": "torn')
    answers, note = read_answers(read, "shapes")
    assert len(answers) == 30
    assert "shapes.jsonl:31" in note


def test_pictures_come_from_the_run_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run")
    read = open_run(tmp_path, "run")
    assert thumbnail(read, "samples/shapes-0.png").startswith("data:image/webp;base64,")
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    (run / "samples/link.png").symlink_to(tmp_path / "private.png")
    for name in ("../private.png", str(tmp_path / "private.png"), "samples/link.png"):
        with refused("no-permission", name):
            thumbnail(read, name)
    (run / "samples/no.png").write_bytes(b"<svg onload=alert(1)>")
    with refused("unreadable-image", "samples/no.png", error=DataError):
        thumbnail(read, "samples/no.png")
    PIL.Image.new("1", (8000, 8000)).save(run / "samples/huge.png")
    with refused("unreadable-image", "samples/huge.png", "8000 × 8000", "16,000,000", error=DataError):
        thumbnail(read, "samples/huge.png")


def test_every_text_of_a_run_is_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run")
    results = json.loads((run / "results.json").read_text())
    task = results["tasks"][0]
    task["name"] = EVIL
    task["samples"] = [{**task["samples"][0], "question": EVIL, "answer": EVIL, "prediction": EVIL, "image": EVIL}]
    results["stages"] = [{"name": EVIL, "left_out": [1]}]
    (run / "results.json").write_text(json.dumps(results))
    (run / "recipe.yaml").write_text("- " + EVIL)
    read = open_run(tmp_path, "run")
    answers, _ = read_answers(read, EVIL)
    shown = (
        runs_html.summary(read, words())
        + runs_html.answers_grid(read, answers, words())
        + runs_html.curves(read, words())
    )
    assert EVIL[:10] not in shown
    assert "<script" not in shown
    assert "&lt;script" in shown


def test_both_languages_have_the_same_texts_with_the_same_places() -> None:
    import string

    assert RUN_TEXTS["en"].keys() == RUN_TEXTS["ja"].keys()
    for key, text in RUN_TEXTS["en"].items():
        fields = [{f for _, f, _, _ in string.Formatter().parse(t) if f} for t in (text, RUN_TEXTS["ja"][key])]
        assert fields[0] == fields[1], key
        assert RUN_TEXTS["ja"][key] != text or key == "runs_steps_open", key
